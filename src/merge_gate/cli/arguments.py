"""Arguments and help texts that several commands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

DEFAULT_OUTPUT = "merge-gate-report"

EXIT_CODES = """\
exit codes:
  0  pass: no adapter failed (but for failures that a baseline accepts): each was merged and every parameter of the
     result checked, with --quick some by a bound instead of a merge
  1  fail: at least one adapter is broken; the report says which and why
  2  usage or configuration error: nothing was judged
  3  error: no adapter failed, but at least one could not be judged
"""

Commands = argparse._SubParsersAction  # noqa: SLF001 - argparse has no public name for it


def add_names(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "names",
        nargs="+",
        type=given,
        metavar="CONFIG|ADAPTER",
        help="the YAML file that lists the adapters, or adapters: directories, globs, Hub ids",
    )


def add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument(
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
    """An empty word is a mistake: without it another base, in another dtype, would be judged."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty (a variable that is not set?)")
    return text
