"""Merges that the worker sends are kept within the sizes of the base's own tensors: the worker is not trusted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from merge_gate._internal.errors import GateError
from merge_gate.exporting.kept_merges import KeptMerges
from merge_gate.records.files import StoredTensor

if TYPE_CHECKING:
    from pathlib import Path

ENTRY: Any = SimpleNamespace(base_files=SimpleNamespace(tensors=(StoredTensor(name="w", dtype="F32", shape=(2,)),)))
PART = memoryview(b"\0" * 8)


@pytest.mark.parametrize(("name", "offset"), [("other", 0), ("../w", 0), ("w", -1), ("w", 9), ("w", 1 << 60)])
def test_what_is_no_tensor_of_the_base_is_not_kept(name: str, offset: int, tmp_path: Path) -> None:
    kept = KeptMerges(tmp_path)
    kept.choose({0: ENTRY})
    kept.part(0, "w", 0, PART)
    kept.part(0, name, offset, PART)
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [8]
    with pytest.raises(GateError, match="not one of the base"):
        kept.whole(0)
