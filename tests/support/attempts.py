"""Writes the table of attempts: what an outsider tried, what the gate should do, and what the test saw.

A test is marked `@pytest.mark.attempt(ID, what, expected)`, once for each attempt that it repeats. `make attempts` runs
the marked tests and writes `tests/attempts.md`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PROPERTY = "attempt"
AS_EXPECTED = "as expected"
ROWS = pytest.StashKey[list[tuple[str, str, str]]]()
"""The rows of all collected tests, also of those that this run leaves out."""

_HEAD = """# Attempts

Each row is something that an outsider tried against the gate, or a control that must stay green. `make attempts` runs
the tests and writes this table. `tests/test_attempts.py` compares the rows with the tests.

| id | tried | expected | seen |
|---|---|---|---|
"""


def rows_of(item: pytest.Item) -> Iterator[tuple[str, str, str]]:
    """The attempts that a test repeats: id, what, and expected."""
    for mark in item.iter_markers(PROPERTY):
        number, what, expected = mark.args
        yield number, what, expected


def lines(table: Path) -> list[str]:
    """The rows of a written table."""
    return [line for line in table.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]


def cells(line: str) -> list[str]:
    """The cells of a row."""
    return [cell.replace("\\|", "|") for cell in re.split(r"(?<!\\) \| ", line[2:-2])]


class AttemptTable:
    """Collects the outcomes in the process that reports, and writes them at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: dict[tuple[str, str, str], list[bool]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        for name, row in report.user_properties:
            if name == PROPERTY:
                number, what, expected = row
                self._seen.setdefault((number, what, expected), []).append(report.passed)

    def pytest_sessionfinish(self) -> None:
        self._path.write_text(_HEAD + "".join(sorted(map(self._line, self._seen))), encoding="utf-8")

    def _line(self, row: tuple[str, str, str]) -> str:
        seen = AS_EXPECTED if all(self._seen[row]) else "**not as expected**"
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in (*row, seen))} |\n"


def collect(config: pytest.Config, items: Iterable[pytest.Item]) -> None:
    """Keep the rows of the collected tests."""
    config.stash[ROWS] = [row for item in items for row in rows_of(item)]


def configure(config: Any) -> None:
    """Add the table if `--attempts` asks for it, in the process that has all reports."""
    path = config.getoption("--attempts")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(AttemptTable(Path(path)), "attempt-table")
