"""Writes the report while a run continues, so that a killed run leaves a true one.

In: the report so far, at any moment. Out: files in the output directory, at a bounded share of the run's time.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from merge_gate.errors import GateError
from merge_gate.report.formats.json_report import RenderedAdapters
from merge_gate.report.stored.report_files import FORMATS, write_report

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from merge_gate.records.report import Report

PROVISIONAL_FORMATS = ("report.json",)
"""What is written while a run continues. The other formats exist from its start and say that the run is not complete.
They are written again when the run first waits. They contain the cached verdicts by then, so the last report takes less
time."""

PAUSE_RATIO = 4.0
"""After a provisional report, the next one waits this many times as long as it took. With a thousand adapters, a report
after each would take longer than the merges."""

SENT_EVERY_S = 10.0
"""The pause of a run that sends its reports: another machine receives those of many runs."""


class ReportWriter:
    """Writes to one directory. If it is None, `send` gets the reports, if there is one.

    Only the first and the last report must reach it. A failure in between is reported once, and the next report tries
    again. Each report reuses the texts of adapters that the last report had.
    """

    def __init__(
        self, directory: str | None, notify: Callable[[str], None], send: Callable[[Report], None] | None = None
    ) -> None:
        self._directory, self._notify, self._send = directory, notify, send
        self._rendered = RenderedAdapters()
        self._has_notified = False
        self._pending = False
        self._has_waited = False
        self._next_write_s = 0.0

    def write_first(self, report: Report) -> None:
        """Write every format, before anything is judged.

        Raises:
            UsageError: the directory cannot be used.
        """
        self._write(report, FORMATS)

    def write_last(self, report: Report) -> None:
        """Write every format at the end.

        Raises:
            GateError: the directory can no longer be used. It could at the start, so this is not a usage error.
        """
        try:
            self.write_first(report)
        except GateError as error:
            raise GateError(f"the report is lost: {error.message}", hint=error.hint) from error

    def changed(self) -> None:
        """Note that the report on disk is out of date."""
        self._pending = self._directory is not None or self._send is not None

    def catch_up(self, current: Callable[[], Report], *, at_once: bool = False) -> None:
        """Write a provisional report if something changed, unless the last one was a moment ago.

        Args:
            current: makes the report.
            at_once: write it without a pause, because the run waits anyway.
        """
        began_s = time.monotonic()
        if not self._pending or (began_s < self._next_write_s and not at_once):
            return
        formats = FORMATS if at_once and not self._has_waited else PROVISIONAL_FORMATS
        self._has_waited |= at_once
        try:
            self._write(current(), formats)
        except GateError as error:
            self._notify_once(error)
        ended_s = time.monotonic()
        pause_s = PAUSE_RATIO * (ended_s - began_s) if self._directory is not None else SENT_EVERY_S
        self._next_write_s = ended_s + pause_s

    def _write(self, report: Report, formats: Collection[str]) -> None:
        if self._directory is not None:
            write_report(report, self._directory, formats=formats, rendered=self._rendered)
        elif self._send is not None:
            self._send(report)
        self._pending = False

    def _notify_once(self, error: GateError) -> None:
        if not self._has_notified:
            self._notify(f"{error.message}; the run continues and writes the report again later")
        self._has_notified = True
