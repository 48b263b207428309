"""Entries by base, without torch: what shares a load, and how long each may take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from merge_gate.records.config import AdapterSpec, BaseSpec
from merge_gate.records.files import AdapterFiles, BaseFiles, Entry, Snapshot
from merge_gate.run.grouping import LIMIT_PER_GIB_S, group_by_base
from merge_gate.worker.protocol import DEFAULT_LIMIT_S

BASE = BaseSpec(model="./base", label="./base")


def entry(directory: Path, dtype: str = "float32", limit_seconds: float | None = None, size_bytes: int = 0) -> Entry:
    spec = AdapterSpec(name="a", source="./a", base=BASE, checks=(), line=1, column=1, limit_seconds=limit_seconds)
    files = BaseFiles(directory=str(directory), weight_bytes=size_bytes)
    base = Snapshot(name=directory.name, directory=str(directory), base_files=files)
    return Entry(spec=spec, dtype=dtype, members=(AdapterFiles(directory="a"),), base=base)


def test_one_group_for_each_base_and_dtype_in_the_order_of_the_config(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    entries = [entry(second), entry(first), entry(second, "bfloat16"), entry(second)]
    groups = group_by_base(enumerate(entries))
    assert [(group.base.name, group.base.dtype, [task.index for task in group.tasks]) for group in groups] == [
        ("second", "float32", [0, 3]),
        ("first", "float32", [1]),
        ("second", "bfloat16", [2]),
    ]


def test_the_time_limit_grows_with_the_base_and_the_adapters_own_is_taken(tmp_path: Path) -> None:
    """The size is known from the headers: the mount of the base may not answer any more."""
    absent = tmp_path / "absent"
    entries = [entry(tmp_path, size_bytes=2 << 30), entry(tmp_path, limit_seconds=7.0), entry(absent)]
    groups = group_by_base(enumerate(entries))
    limits = {task.index: task.limit_s for group in groups for task in group.tasks}
    assert limits == {0: DEFAULT_LIMIT_S + 2 * LIMIT_PER_GIB_S, 1: 7.0, 2: DEFAULT_LIMIT_S}


def test_an_entry_that_was_to_be_settled_before_is_a_bug(tmp_path: Path) -> None:
    one = entry(tmp_path)
    with pytest.raises(AssertionError, match="has a verdict before it is grouped"):
        group_by_base([(0, replace(one, base=None))])
