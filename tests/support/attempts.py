"""Prints the table of attempts: what an outsider tried, what the gate should do, and what the test saw.

A test is marked `@pytest.mark.attempt(ID, what, expected)`, once for each attempt that it repeats. `make attempts` runs
the marked tests and prints the table.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

PROPERTY = "attempt"
AS_EXPECTED = "as expected"
ROWS = pytest.StashKey[list[tuple[str, str, str]]]()
"""The rows of all collected tests, also of those that this run leaves out."""

_HEAD = ("| id | tried | expected | seen |", "|---|---|---|---|")
"""Of a table of what outsiders tried against the gate, and of controls that must stay green."""


def rows_of(item: pytest.Item) -> Iterator[tuple[str, str, str]]:
    """The attempts that a test repeats: id, what, and expected."""
    for mark in item.iter_markers(PROPERTY):
        number, what, expected = mark.args
        yield number, what, expected


class AttemptTable:
    """Collects the outcomes in the process that reports, and prints them at the end."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str, str], list[bool]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        for name, row in report.user_properties:
            if name == PROPERTY:
                number, what, expected = row
                self._seen.setdefault((number, what, expected), []).append(report.passed)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for line in (*_HEAD, *sorted(map(self._line, self._seen))):
            terminalreporter.write_line(line)

    def _line(self, row: tuple[str, str, str]) -> str:
        seen = AS_EXPECTED if all(self._seen[row]) else "**not as expected**"
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in (*row, seen))} |"


def collect(config: pytest.Config, items: Iterable[pytest.Item]) -> None:
    """Keep the rows of the collected tests."""
    config.stash[ROWS] = [row for item in items for row in rows_of(item)]


def configure(config: Any) -> None:
    """Add the table if `--attempts` asks for it, in the process that has all reports."""
    if config.getoption("--attempts") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(AttemptTable(), "attempt-table")
