"""Arguments and help texts that several commands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from merge_gate.output_files import OUTPUT_FILES
from merge_gate.text import one_of

if TYPE_CHECKING:
    from merge_gate.report.stored.report_copies import ReportCopy

DEFAULT_OUTPUT = "merge-gate-report"
DEFAULT_CONFIG = "merge-gate.yml"
FORMATS = tuple(file.word for file in OUTPUT_FILES)
"""The formats of a report, by the words of the command line."""


def exit_codes(*lines: str) -> str:
    """The end of a help text."""
    return "".join(f"{line}\n" for line in ("exit codes:", *(f"  {line}" for line in lines)))


EXIT_CODES = exit_codes(
    "0  pass: no adapter failed, except failures that a baseline accepts. Every adapter was merged, and every",
    "   parameter of the result checked, with --quick some by a bound instead of a merge",
    "1  fail: at least one adapter is broken; the report says which and why",
    "2  usage or configuration error: nothing was judged",
    "3  error: no adapter failed, but at least one could not be judged",
)

Commands = argparse._SubParsersAction  # noqa: SLF001 - argparse has no public name for it


class CommandParser(argparse.ArgumentParser):
    """A parser that knows no abbreviations: a later option could give `--out` another meaning."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)


def add_names(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "names",
        nargs="*",
        type=given,
        metavar="CONFIG|ADAPTER",
        help="the YAML file that lists the adapters, or adapters: directories, globs, Hub ids "
        f"(default: {DEFAULT_CONFIG})",
    )


def add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "-o",
        "--output",
        default=DEFAULT_OUTPUT,
        type=_directory,
        metavar="DIR",
        help=f"where the report goes (default: {DEFAULT_OUTPUT})",
    )


def add_reports(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--report",
        action="append",
        default=[],
        type=_copy,
        metavar="FORMAT=FILE",
        help=f"write the report to FILE as well, or to standard output if FILE is `-`; FORMAT is {one_of(FORMATS)}; "
        "repeatable",
    )


def _copy(text: str) -> ReportCopy:
    from merge_gate.report.stored.report_copies import ReportCopy

    word, equals, place = text.partition("=")
    if word not in FORMATS or not equals or not place:
        raise argparse.ArgumentTypeError(f"{text!r} is not FORMAT=FILE, with {one_of(FORMATS)}")
    return ReportCopy(word, place)


def _directory(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty, expected a directory (a variable that is not set?)")
    return text


def given(text: str) -> str:
    """The text, unless it is empty. An empty base or dtype would silently select another one."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty (a variable that is not set?)")
    return text
