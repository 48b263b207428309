"""The output of a command: its view, its output directory, a document on standard output, the exit code."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, TextIO

from merge_gate.errors import ExitCode, GateError
from merge_gate.run.streams import say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from merge_gate.earlier_reports import EarlierReports
    from merge_gate.records.config import Config
    from merge_gate.records.options import RunOptions
    from merge_gate.records.report import Report
    from merge_gate.report.stored.report_files import ReportCopy
    from merge_gate.run.view import View
    from merge_gate.worker.supervisor import WorkerSlot

EXIT_CODE_OF = {"pass": ExitCode.PASS, "fail": ExitCode.FAIL, "error": ExitCode.ERROR}


@contextmanager
def view_of(arguments: argparse.Namespace) -> Iterator[tuple[View, TextIO]]:
    """The view that the options ask for, and the stream of its result: standard error if a report is printed."""
    from merge_gate.report.stored.report_files import is_any_printed
    from merge_gate.run.view import Appearance, make_view

    stream = sys.stderr if is_any_printed(getattr(arguments, "report", ())) else sys.stdout
    appearance = Appearance(quiet=arguments.quiet, verbose=arguments.verbose, color=arguments.color)
    with closing(make_view(stream, sys.stderr, env=os.environ, appearance=appearance)) as view:
        yield view, stream


def gate_adapters(
    config: Config,
    options: RunOptions,
    arguments: argparse.Namespace,
    *,
    worker: WorkerSlot | None = None,
    begins: Callable[[], object] = lambda: None,
    ray: str | None = None,
) -> Report:
    """Gate adapters with the view that the options ask for, here or on the Ray cluster at an address."""
    from merge_gate.run.flow import run_gate

    with view_of(arguments) as (view, _):
        if ray is not None:
            from merge_gate.on_ray.run_on_ray import run_on_ray

            return run_on_ray(ray, config, options, view=view, begins=begins)
        return run_gate(config, options, view=view, worker=worker, begins=begins)


@contextmanager
def claimed_output(output: str) -> Iterator[EarlierReports]:
    """Hold the output directory. At the end, say where the report of an earlier run is."""
    from merge_gate.report.stored.output_directory import claimed

    with claimed(output) as earlier:
        try:
            yield earlier
        finally:
            say_place(earlier)


def say_place(earlier: EarlierReports) -> None:
    if earlier.line:
        say(f"merge-gate: {earlier.line}")


def result_width(stream: TextIO | None = None) -> int:
    """The columns of a result on `stream`, by default standard output: those of a terminal, within limits."""
    from merge_gate.run.view import PLAIN_WIDTH, WIDEST

    if not (stream or sys.stdout).isatty():
        return PLAIN_WIDTH
    return min(shutil.get_terminal_size((PLAIN_WIDTH, 0)).columns, WIDEST)


def exit_code(report: Report) -> ExitCode:
    """The exit code that a finished report asks for."""
    return EXIT_CODE_OF[report.result.value]


def deliver(report: Report, copies: Sequence[ReportCopy]) -> ExitCode:
    """Write the copies of a finished report, and return its exit code."""
    from merge_gate.report.stored.report_files import write_copies

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
