"""Counts in sentences."""

from __future__ import annotations

import pytest

from merge_gate.judging.checks.phrases import are, describe_pattern, figure, nothing_finite, tensors
from merge_gate.records.files import Pattern
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


def test_an_expression_is_shown_at_its_place_and_cut() -> None:
    short, long = (Pattern(place="target_modules", text=text, expression=text) for text in ("(\n", "x" * 1000))
    assert describe_pattern(short) == 'target_modules in adapter_config.json is "(\\n"'
    assert len(describe_pattern(long)) < 300
    assert f'"{"x" * 199}…"' in describe_pattern(long)
    exact = Pattern(place="target_modules", text="x" * 200, expression="x" * 200)
    assert f'"{"x" * 200}"' in describe_pattern(exact)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.25, "0.25"), (999.0, "999"), (1000.0, "1,000"), (-1000.5, "-1,000"), (1e9 - 1, "999,999,999"), (1e9, "1e+09")],
)
def test_a_figure_has_three_digits_or_is_whole(value: float, text: str) -> None:
    assert figure(value) == text
