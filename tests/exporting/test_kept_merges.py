"""Merges that the worker sends are kept within the sizes of the base's own tensors: the worker is not trusted."""

from __future__ import annotations

import contextlib
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from merge_gate._internal.errors import GateError
from merge_gate.exporting.kept_merges import ComparedMerges, KeptMerges
from merge_gate.exporting.plain_lora import PlainLora
from merge_gate.files.headers import DTYPE_BITS
from merge_gate.records.files import StoredTensor
from merge_gate.records.measured import ServedClass
from merge_gate.records.refusals import NotJudged
from merge_gate.worker.protocol import PublicationSent

if TYPE_CHECKING:
    from pathlib import Path

UNITS = {"F64": 2.0**-52, "F32": 2.0**-23, "F16": 2.0**-10}
ENTRY: Any = SimpleNamespace(base_files=SimpleNamespace(tensors=(StoredTensor(name="w", dtype="F32", shape=(2,)),)))
PART = memoryview(b"\0" * 8)


def planned(place: Path) -> KeptMerges:
    kept = KeptMerges(place)
    kept.choose({0: ENTRY})
    kept.planned(0, ENTRY.base_files.tensors)
    return kept


@pytest.mark.parametrize(("name", "offset"), [("other", 0), ("../w", 0), ("w", -1), ("w", 1), ("w", 1 << 60)])
def test_what_is_not_planned_is_not_kept(name: str, offset: int, tmp_path: Path) -> None:
    kept = planned(tmp_path)
    kept.part(0, "w", 0, PART)
    with pytest.raises(GateError):
        kept.part(0, name, offset, PART)
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [8]


@pytest.mark.parametrize(("name", "shape"), [("other", (2,)), ("w", (1 << 40,)), ("w", ())])
def test_a_plan_has_tensors_of_the_base_only(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(GateError):
        planned(tmp_path).planned(0, (StoredTensor(name=name, dtype="F32", shape=shape),))


@pytest.mark.parametrize(("free", "is_enough"), [(8, True), (7, False)])
def test_a_small_disk_is_refused(free: int, is_enough: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept already needs no more room."""
    kept = KeptMerges(tmp_path)
    kept.choose({0: ENTRY, 1: ENTRY})
    kept.planned(0, ENTRY.base_files.tensors)
    kept.part(0, "w", 0, PART)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=free, f_frsize=1))
    with contextlib.nullcontext() if is_enough else pytest.raises(GateError):
        kept.planned(1, ENTRY.base_files.tensors)


def test_a_merge_that_was_not_sent_whole_is_not_compared(tmp_path: Path) -> None:
    """The reason has its own hint, if it has one."""
    kept, tensors = planned(tmp_path), ENTRY.base_files.tensors
    for refusal, hint in (NotJudged(message="full", hint="free some"), "free some"), (None, "--publish"):
        kept.sent(PublicationSent(task=0, tensors=tensors, refusal=refusal))
        with pytest.raises(GateError) as caught:
            kept.whole(0)
        assert hint in caught.value.hint
    kept.part(0, "w", 0, PART)
    assert kept.whole(0).tensors == {"w": tensors[0]}


@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize(("units", "is_same"), [(0, True), (1, True), (2, False)])
def test_a_value_may_differ_by_a_unit_in_the_last_place(dtype: str, units: int, is_same: bool, tmp_path: Path) -> None:
    tensors = (StoredTensor(name="w", dtype=dtype, shape=(2,)),)
    made = PlainLora(config={"r": 8}, tensors={}, padding=(), is_folded=False, bounds={"w": 0.0})
    served = ServedClass(name="A", loaded="A", names={}, scalings={}, sizes={}, sources={"w": ("w",)})
    before = planned(tmp_path)
    before.served = served
    after = ComparedMerges(before, made)
    after.choose({0: ENTRY})
    for merges, last in (before, 1.0), (after, 1 + units * UNITS[dtype]):
        merges.planned(0, tensors)
        merges.part(0, "w", 0, memoryview(np.array([1, last], f"<f{DTYPE_BITS[dtype] // 8}").tobytes()))
        merges.sent(PublicationSent(task=0, tensors=tensors))
    if is_same:
        found = after.comparison(0, dtype)
        assert (found.values, found.differing, found.largest) == (2, int(units > 0), units * UNITS[dtype])
    else:
        with pytest.raises(GateError):
            after.comparison(0, dtype)
