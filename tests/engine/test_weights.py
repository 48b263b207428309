"""The tensors of an adapter's own file, and what torch's restricted loader refuses of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merge_gate.engine.weights import read_weights
from merge_gate.errors import Refused
from merge_gate.records.files import AdapterConfig, AdapterFiles
from tests.sources.test_pickled import Call

TENSORS = {"a": torch.ones(2, 3), "b": torch.zeros(2)}


def files(directory: Path, weights: str | None) -> AdapterFiles:
    return AdapterFiles(
        directory=str(directory), config=AdapterConfig(), weights=weights, tensors=(), files=(), findings=()
    )


def test_both_formats_hold_the_same(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    torch.save(TENSORS | {"more": {1, 2}}, tmp_path / "a.bin")
    for name in ("a.safetensors", "a.bin"):
        found = read_weights(files(tmp_path, name))
        assert found.keys() == TENSORS.keys()
        assert all(torch.equal(found[key], TENSORS[key]) for key in TENSORS)
    assert read_weights(files(tmp_path, None)) == {}


def test_what_torch_refuses_is_named(tmp_path: Path) -> None:
    """A function of torch's own, which the preflight leaves to it."""
    torch.save(TENSORS | {"more": Call(torch.hub.load, "acme/x", "y")}, tmp_path / "a.bin")
    with pytest.raises(Refused) as raised:
        read_weights(files(tmp_path, "a.bin"))
    refusal = raised.value.refusal
    assert refusal.check == "file-corrupt"
    assert 'torch refuses "torch.hub.load" in them' in refusal.message
    assert refusal.hint.startswith("do not load this file")


def test_what_is_cut_off_is_refused(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "a.bin")
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-40])
    with pytest.raises(Refused) as raised:
        read_weights(files(tmp_path, "a.bin"))
    assert raised.value.refusal.message.endswith("(RuntimeError)")
