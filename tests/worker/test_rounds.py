"""Which groups of a job the worker judges together."""

from __future__ import annotations

from dataclasses import replace

from merge_gate.records.files import BaseFiles
from merge_gate.records.terms import BaseKey
from merge_gate.worker.child import is_same_base, rounds
from merge_gate.worker.protocol import Group, Task


def group(directory: str, dtype: str, task: int, *, one_pass: bool = True, quantization: str = "none") -> Group:
    key = BaseKey(model=directory, revision=None, dtype=dtype, quantization=quantization)
    return Group(
        base=key,
        directory=directory,
        files=BaseFiles(directory=directory),
        tasks=(Task(index=task, files=()),),
        one_pass=one_pass,
    )


def test_dtypes_of_a_base_that_is_read_in_a_pass_come_together() -> None:
    groups = [
        group("a", "bfloat16", 0),
        group("b", "bfloat16", 1),
        group("a", "float32", 2),
        group("a", "bfloat16", 3, quantization="bnb-4bit"),
        replace(group("a", "float16", 4), tasks=()),
        group("b", "float16", 5),
    ]
    assert list(rounds(groups)) == [[0, 2], [1, 5], [3]]


def test_a_base_that_fits_in_memory_comes_one_dtype_at_a_time() -> None:
    groups = [group("a", dtype, index, one_pass=False) for index, dtype in enumerate(("bfloat16", "float32"))]
    assert list(rounds(groups)) == [[0], [1]]
    assert list(rounds([])) == []
    assert is_same_base(groups[0], groups[1])


def test_groups_whose_bases_are_read_in_another_way_are_apart() -> None:
    first, second = group("a", "bfloat16", 0), group("a", "float32", 1)
    assert list(rounds([first, replace(second, fed=True)])) == [[0], [1]]
    on_network = [replace(one, one_pass=False, fed=True) for one in (first, second)]
    assert list(rounds(on_network)) == [[0, 1]]
    assert not is_same_base(first, replace(second, keeps_figures=True))
