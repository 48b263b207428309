"""What a worker must not load: the weight files of a streamed base are stubs, with headers and without values."""

from __future__ import annotations

from pathlib import Path

import pytest

from merge_gate.engine.base.loaded_base import ModelClass
from merge_gate.errors import EngineError
from merge_gate.records.files import BaseFiles
from merge_gate.records.terms import BaseKey, Quantization
from merge_gate.worker import group_bases
from merge_gate.worker.memory import MemoryGroup
from merge_gate.worker.protocol import Group
from tests.support.wording import Wording


def group(directory: str, *, is_streamed: bool) -> Group:
    key = BaseKey(model="acme/base", revision=None, dtype="auto", quantization=Quantization.NONE)
    files = BaseFiles(directory=directory, weight_bytes=3 << 30, is_streamed=is_streamed)
    return Group(base=key, directory=directory, files=files, tasks=())


def test_no_stub_is_loaded_and_the_error_names_class_reason_and_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wording: Wording
) -> None:
    monkeypatch.setattr(MemoryGroup, "free_bytes", lambda _: 2 << 30)
    model_class = ModelClass(class_name="OddForCausalLM")
    with pytest.raises(EngineError) as refused:
        group_bases.refuse_stubs(group(str(tmp_path), is_streamed=True), model_class, "it is odd")
    wording(refused.value)
    group_bases.refuse_stubs(group(str(tmp_path), is_streamed=False), model_class, "it is odd")
