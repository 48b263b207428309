"""Widths: what is cut or broken still fits, and breaks where a reader expects it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from merge_gate.report.wording.columns import cells, cut, fit, pad, wrap
from merge_gate.report.wording.untrusted import one_line
from tests.support.reports import TEXTS


def test_wide_characters_take_two_columns() -> None:
    assert cells("名前e\u0301") == 5
    assert cut("名前名前", 5) == "名…前"
    assert pad("名前", 6) == "名前  "


def test_long_names_break_after_a_dot() -> None:
    assert wrap("see model.layers.17.mlp.up_proj now", 16) == ["see", "model.layers.17.", "mlp.up_proj now"]


def test_the_widest_column_gives_way() -> None:
    assert fit([30, 8, 6], 30) == [16, 8, 6]
    assert fit([5, 5], 0) == [1, 1]


@given(TEXTS, st.integers(4, 60))
def test_everything_fits_and_nothing_is_lost(text: str, width: int) -> None:
    line = one_line(text)
    lines = wrap(line, width)
    assert all(cells(part) <= width for part in lines)
    assert "".join(lines).replace(" ", "") == line.replace(" ", "")
    assert cells(cut(line, width)) <= width
    assert cells(pad(line, width)) == width
