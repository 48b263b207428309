"""`merge-gate check`: judge the configuration and the files. Loads no model."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing

from merge_gate.cli.arguments import CommandParser, Commands, add_names, exit_codes
from merge_gate.cli.gating import requested_config
from merge_gate.errors import ExitCode
from merge_gate.run.streams import tell

EXIT_CODES_OF_CHECK = exit_codes(
    "0  the files of every adapter are sound; nothing was merged",
    "1  the files of at least one adapter failed",
    "2  usage or configuration error: nothing was checked",
    "3  no adapter failed, but at least one could not be judged: its files or those of its base",
)


def add(commands: Commands[CommandParser]) -> None:
    check = commands.add_parser(
        "check",
        help="check config and files only",
        description="Check CONFIG and the adapters' files, or the files of the adapters that are named: formats, "
        "headers, adapter_config.json, expectations. Loads no model; a clean check says nothing about values.",
        epilog=EXIT_CODES_OF_CHECK,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_names(check)
    check.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="check this adapter only; repeatable"
    )


def run(arguments: argparse.Namespace) -> int:
    from merge_gate.records.terms import Verdict
    from merge_gate.report.formats.terminal_text import file_lines
    from merge_gate.report.wording.words import counted
    from merge_gate.run.flow import check_files
    from merge_gate.run.view import make_view

    config = requested_config(arguments)
    counts = dict.fromkeys(Verdict, 0)
    with closing(make_view(sys.stdout, sys.stderr, env=os.environ)) as view:
        for adapter in check_files(config, view=view, only=tuple(arguments.only)):
            counts[adapter.verdict] += 1
            for line in file_lines(adapter, of=len(config.adapters)):
                tell(line)
    tell(
        f"{counted(sum(counts.values()), 'adapter')}: the files of {counts[Verdict.PASSED]:,} are sound, "
        f"{counts[Verdict.FAILED]:,} failed, {counts[Verdict.ERROR]:,} could not be judged. Nothing was merged: "
        "`merge-gate run` does that."
    )
    if counts[Verdict.FAILED]:
        return ExitCode.FAIL
    return ExitCode.ERROR if counts[Verdict.ERROR] else ExitCode.PASS
