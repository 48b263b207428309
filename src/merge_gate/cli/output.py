"""Results of a command: the claimed output directory, a document on standard output, the exit code."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from merge_gate.errors import ExitCode, GateError
from merge_gate.run.streams import say

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from merge_gate.earlier_reports import EarlierReports
    from merge_gate.records.report import Report
    from merge_gate.report.stored.report_copies import ReportCopy

EXIT_CODE_OF = {"pass": ExitCode.PASS, "fail": ExitCode.FAIL, "error": ExitCode.ERROR}


@contextmanager
def claimed_output(output: str) -> Iterator[EarlierReports]:
    """Hold the output directory; at the end, say where the reports of earlier runs are."""
    from merge_gate.report.stored.output_directory import claimed

    with claimed(output) as earlier:
        try:
            yield earlier
        finally:
            say_place(earlier)


def say_place(earlier: EarlierReports) -> None:
    if earlier.line:
        say(f"merge-gate: {earlier.line}")


def exit_code(report: Report) -> ExitCode:
    """The exit code that a finished report asks for."""
    return EXIT_CODE_OF[report.result.value]


def deliver(report: Report, copies: Sequence[ReportCopy]) -> ExitCode:
    """Write the copies of a finished report, and return its exit code."""
    from merge_gate.report.stored.report_copies import write_copies

    text = write_copies(report, copies)
    return print_document(text, exit_code(report)) if text else exit_code(report)


def print_document(text: str, code: ExitCode = ExitCode.PASS) -> ExitCode:
    """Write a document, as UTF-8 whatever the locale is. It is all the output there is, so an error is one."""
    try:
        sys.stdout.buffer.write(text.encode("utf-8"))
        sys.stdout.buffer.flush()
    except OSError as error:
        raise GateError(f"standard output cannot be written to: {error.strerror}") from error
    return code
