"""The output of a command: its view, its output directory, a document on standard output, the exit code."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, TextIO

from merge_gate._internal.errors import ExitCode, GateError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from merge_gate.records.config import Config
    from merge_gate.records.options import RunOptions
    from merge_gate.records.report import Report
    from merge_gate.report.stored.report_files import ReportCopy
    from merge_gate.run.view import View
    from merge_gate.worker.supervisor import WorkerSlot

EXIT_CODE_OF = {"pass": ExitCode.PASS, "fail": ExitCode.FAIL, "error": ExitCode.ERROR}


DEBUG = "MERGE_GATE_DEBUG"
"""The variable that asks for the details of `--verbose`."""
_DUMB = ("dumb", "unknown")
"""Values of TERM of terminals without colors."""


@contextmanager
def view_of(arguments: argparse.Namespace) -> Iterator[View]:
    """The view that the options ask for. Its result goes to standard error if a report is printed."""
    from merge_gate.report.stored.report_files import is_any_printed

    stream = sys.stderr if is_any_printed(getattr(arguments, "report", ())) else sys.stdout
    asked = {"quiet": arguments.quiet, "verbose": arguments.verbose, "color": arguments.color}
    with closing(make_view(stream, sys.stderr, env=os.environ, **asked)) as view:
        yield view


def gate_adapters(
    config: Config,
    options: RunOptions,
    arguments: argparse.Namespace,
    *,
    worker: WorkerSlot | None = None,
    begins: Callable[[], object] = lambda: None,
) -> Report:
    """Gate adapters with the view that the options ask for."""
    from merge_gate.run.flow import run_gate

    with view_of(arguments) as view:
        return run_gate(config, options, view=view, worker=worker, begins=begins)


def make_view(
    stdout: TextIO,
    stderr: TextIO,
    *,
    env: Mapping[str, str],
    quiet: bool = False,
    verbose: bool = False,
    color: str = "auto",
) -> View:
    """Return the view that suits the streams, the environment (TERM, CI, GITHUB_ACTIONS), and the user's options."""
    from merge_gate.run.view import PlainView

    verbose = verbose or bool(env.get(DEBUG))
    in_ci = any(env.get(name, "").lower() not in {"", "0", "false"} for name in ("CI", "GITHUB_ACTIONS"))
    colors_result = _uses_color(stdout, env, color)
    if in_ci or env.get("TERM") in _DUMB or quiet or verbose or not stderr.isatty():
        return PlainView(stdout, stderr, quiet=quiet, verbose=verbose, color=colors_result)
    from merge_gate.run.rich_view import RichView

    return RichView(stdout, stderr, color=_uses_color(stderr, env, color), colors_result=colors_result)


def _uses_color(stream: TextIO, env: Mapping[str, str], asked: str) -> bool:
    """Whether text on a stream is colored: as asked, else by NO_COLOR and FORCE_COLOR, else on a terminal."""
    if asked != "auto":
        return asked == "always"
    if env.get("NO_COLOR"):
        return False
    return bool(env.get("FORCE_COLOR")) or (stream.isatty() and env.get("TERM") not in _DUMB)


def exit_code(report: Report) -> ExitCode:
    """The exit code that a finished report asks for."""
    return EXIT_CODE_OF[report.result.value]


def deliver(report: Report, copies: Sequence[ReportCopy]) -> ExitCode:
    """Write the copies of a finished report, and return its exit code."""
    from merge_gate.report.stored.report_files import write_copies

    text = write_copies(report, copies)
    return print_document(text, exit_code(report)) if text else exit_code(report)


def print_document(text: str, code: ExitCode = ExitCode.PASS) -> ExitCode:
    """Write a document as UTF-8 in any locale. It is the whole output, so a failed write is an error."""
    try:
        sys.stdout.buffer.write(text.encode("utf-8"))
        sys.stdout.buffer.flush()
    except OSError as error:
        raise GateError(f"standard output cannot be written to: {error.strerror}") from error
    return code
