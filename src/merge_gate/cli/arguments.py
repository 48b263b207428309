"""Arguments and help texts that several commands share."""

from __future__ import annotations

import argparse
from typing import Any

DEFAULT_OUTPUT = "merge-gate-report"
DEFAULT_CONFIG = "merge-gate.yml"


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


def _directory(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty, expected a directory (a variable that is not set?)")
    return text


def given(text: str) -> str:
    """The text, unless it is empty. An empty base or dtype would silently select another one."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty (a variable that is not set?)")
    return text
