"""When a report is written while a run goes on, so that a run that is killed leaves a true one.

In: the report as it is now, at any moment. Out: files in the output directory, at a bounded share of the run's time.
Knows neither adapters nor the formats' insides.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from merge_gate.errors import GateError
from merge_gate.report.stored.report_files import FORMATS, write_report

if TYPE_CHECKING:
    from collections.abc import Callable

    from merge_gate.records.report import Report

PROVISIONAL_FORMATS = ("report.json",)
"""What is written while a run goes on; the other formats are there from its start and say that it is not complete. They
are written once more when the run first waits: what earlier runs have judged is laid out by then, and the last report
takes less time."""

PAUSE_RATIO = 4.0
"""After a provisional report, no other for this many times as long as it took: with a thousand adapters, writing the
report after each would take longer than judging them."""


class ReportWriter:
    """Writes to one directory; to none where it is None.

    Only the first and the last report must reach it: what goes wrong in between is told, once, and tried again.
    """

    def __init__(self, directory: str | None, notify: Callable[[str], None]) -> None:
        self._directory = directory
        self._notify = notify
        self._is_told = False
        self._pending = False
        self._has_waited = False
        self._next_write_s = 0.0

    def write_first(self, report: Report) -> None:
        """Write every format, before anything is judged.

        Raises:
            UsageError: the directory cannot be used.
        """
        if self._directory is not None:
            write_report(report, self._directory)
        self._pending = False

    def write_last(self, report: Report) -> None:
        """Write every format, after all that could be judged.

        Raises:
            GateError: the directory could be used, and no longer can; that is no wrong usage.
        """
        try:
            self.write_first(report)
        except GateError as error:
            raise GateError(f"the report is lost: {error.message}", hint=error.hint) from error

    def changed(self) -> None:
        """There is something that is not on disk yet."""
        self._pending = True

    def catch_up(self, current: Callable[[], Report], *, at_once: bool = False) -> None:
        """Write what has changed since the last provisional report, unless that was a moment ago.

        `at_once`: the run waits, so that a report costs it nothing.
        """
        began_s = time.monotonic()
        if not self._pending or (began_s < self._next_write_s and not at_once):
            return
        formats = FORMATS if at_once and not self._has_waited else PROVISIONAL_FORMATS
        self._has_waited |= at_once
        try:
            if self._directory is not None:
                write_report(current(), self._directory, formats=formats)
            self._pending = False
        except GateError as error:
            self._tell(error)
        ended_s = time.monotonic()
        self._next_write_s = ended_s + PAUSE_RATIO * (ended_s - began_s)

    def _tell(self, error: GateError) -> None:
        if not self._is_told:
            self._notify(f"{error.message}; judging goes on, and the report is tried again")
        self._is_told = True
