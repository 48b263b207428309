"""The table of attempts has the rows of the tests that repeat them, and each of them was as expected."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tests.support import attempts

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).resolve().parent.parent
LEAST_ROWS = 150


def test_the_table_has_the_rows_of_the_tests(request: pytest.FixtureRequest) -> None:
    table = [tuple(attempts.cells(line)) for line in attempts.lines(ROOT / "tests" / "attempts.md")]
    assert len(table) == len(set(table)) >= LEAST_ROWS
    assert {seen for *_, seen in table} == {attempts.AS_EXPECTED}
    marked = {tuple(row) for row in request.config.stash[attempts.ROWS]}
    rows = {tuple(row) for *row, _ in table}
    assert marked <= rows, "run `make attempts`"
    if request.config.args == request.config.getini("testpaths"):
        assert rows <= marked, "run `make attempts`"
