"""Counts in sentences."""

from __future__ import annotations

import pytest

from merge_gate.judging.checks.phrases import are, nothing_finite, tensors
from tests.support.judging.cases import tensor


@pytest.mark.parametrize(
    ("count", "said", "verb"),
    [(0, "0 tensors", "are"), (1, "1 tensor", "is"), (2, "2 tensors", "are"), (1234, "1,234 tensors", "are")],
)
def test_so_many(count: int, said: str, verb: str) -> None:
    assert (tensors("x" * count), are("x" * count)) == (said, verb)


@pytest.mark.parametrize("counts", [{"nan": 64}, {"posinf": 64}, {"neginf": 64}, {"nan": 1, "posinf": 2, "neginf": 61}])
def test_nothing_finite(counts: dict[str, int]) -> None:
    assert nothing_finite(tensor(**counts))
    assert not nothing_finite(tensor(**counts | {"numel": 65}))
