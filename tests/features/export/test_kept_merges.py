"""Merges that the worker writes are kept as long as the disk has room, and are compared value by value."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from merge_gate._internal.errors import GateError
from merge_gate.features.export.kept_merges import KeptMerges, compared
from merge_gate.features.export.plain_lora import PlainLora
from merge_gate.features.publish.calls import PublicationWritten
from merge_gate.features.publish.planned_files import PlannedFiles
from merge_gate.features.publish.weight_files import CHUNK_BYTES
from merge_gate.files.headers import DTYPE_BITS
from merge_gate.records.files import StoredTensor
from merge_gate.records.measured import ServedClass
from merge_gate.records.refusals import NotJudged

UNITS = {"F64": 2.0**-52, "F32": 2.0**-23, "F16": 2.0**-10}
TENSORS = (StoredTensor(name="w", dtype="F32", shape=(2,)),)
PART = bytes(8)


def written(
    kept: KeptMerges, tensors: Mapping[str, bytes], *plan: StoredTensor, refusal: NotJudged | None = None
) -> None:
    """Play a worker that plans a merge, and writes these tensors."""
    with contextlib.closing(PlannedFiles(kept.planned(0, plan or TENSORS))) as files:
        for name, content in tensors.items():
            files.write(name, 0, memoryview(content))
        kept.written(PublicationWritten(task=0, checksums=tuple(files.checksums.items()), refusal=refusal))


@pytest.mark.parametrize("is_enough", [True, False])
def test_a_small_disk_is_refused(is_enough: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written already needs no more room."""
    kept = KeptMerges(tmp_path / "merges")
    written(kept, {"w": PART})
    (size_bytes,) = (path.stat().st_size for path in kept.folder.iterdir())
    free = size_bytes - (not is_enough)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=free, f_frsize=1))
    with contextlib.nullcontext() if is_enough else pytest.raises(GateError):
        PlannedFiles(kept.planned(1, TENSORS)).close()


def test_a_merge_that_was_not_written_whole_is_not_compared(tmp_path: Path) -> None:
    """The reason has its own hint, if it has one."""
    kept = KeptMerges(tmp_path / "merges")
    for refusal, hint in (NotJudged(message="full", hint="free some"), "free some"), (None, "--publish"):
        with pytest.raises(GateError):
            kept.places(0)
        written(kept, {"w": PART[:4]}, refusal=refusal)
        with pytest.raises(GateError) as caught:
            kept.places(0)
        assert hint in (caught.value.hint or "")
    written(kept, {"w": PART})
    assert [place.tensor.name for place in kept.places(0).values()] == ["w"]


@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize(("units", "is_same"), [(0, True), (1, True), (2, False)])
def test_a_value_may_differ_by_a_unit_in_the_last_place(dtype: str, units: int, is_same: bool, tmp_path: Path) -> None:
    size = CHUNK_BYTES * 8 // DTYPE_BITS[dtype] + 1  # the last one is in a chunk of its own
    made = PlainLora(config={"r": 8}, tensors={}, padding=(), is_folded=False, bounds={"w": 0.0})
    served = ServedClass(name="A", loaded="A", names={}, scalings={}, sizes={}, sources={"w": ("w",)})
    before, after = KeptMerges(tmp_path / "before"), KeptMerges(tmp_path / "after")
    before.served = served
    for merges, last in (before, 1.0), (after, 1 + units * UNITS[dtype]):
        values = np.ones(size, f"<f{DTYPE_BITS[dtype] // 8}")
        values[-1] = last
        written(merges, {"w": values.tobytes()}, StoredTensor(name="w", dtype=dtype, shape=(size,)))
    if is_same:
        found = compared(0, dtype, before, after, made)
        assert (found.values, found.differing, found.largest) == (size, int(units > 0), units * UNITS[dtype])
    else:
        with pytest.raises(GateError):
            compared(0, dtype, before, after, made)
