"""`merge-gate report`: show and compare stored reports, or write a first baseline."""

from __future__ import annotations

import argparse
import sys

from merge_gate._internal.text import WIDEST_TABLE, one_of
from merge_gate.cli.arguments import DEFAULT_OUTPUT, FORMATS, CommandParser, Commands, examples
from merge_gate.cli.output import print_document
from merge_gate.run.streams import width_of

REPORT = "report"
SHOW, DIFF, BASELINE = (f"{REPORT} {word}" for word in ("show", "diff", "baseline"))
"""Commands of two words, which argparse gets as one word."""

_REPORT_HELP = "the report.json of a run, or its directory"
_REPORT_OR_DEFAULT = f"{_REPORT_HELP} (default: {DEFAULT_OUTPUT})"


def add_show(commands: Commands[CommandParser]) -> None:
    show = commands.add_parser(
        SHOW,
        help="show the report of an earlier run",
        description="Show the report of an earlier run.",
        epilog=examples(
            "merge-gate report show", "merge-gate report show merge-gate-report --format html > report.html"
        ),
    )
    show.add_argument("report", metavar="REPORT", nargs="?", default=DEFAULT_OUTPUT, help=_REPORT_OR_DEFAULT)
    formats = ("terminal", *FORMATS)
    show.add_argument(
        "--format", choices=formats, default="terminal", metavar="FORMAT", help=f"{one_of(formats)}; default: terminal"
    )


def add_diff(commands: Commands[CommandParser]) -> None:
    diff = commands.add_parser(
        DIFF,
        help="show what changed between two reports",
        description="Show what changed from one report to another. The exit code is 1 if something broke or got worse. "
        "It is 3 if nothing broke but the newer run is incomplete.",
        epilog=examples(
            "merge-gate report diff merge-gate-report/previous",
            "merge-gate report diff monday/report.json friday/report.json",
        ),
    )
    diff.add_argument("old", metavar="OLD", help=_REPORT_HELP)
    diff.add_argument(
        "new",
        metavar="NEW",
        nargs="?",
        default=DEFAULT_OUTPUT,
        help=f"the report.json of a later run, or its directory (default: {DEFAULT_OUTPUT})",
    )
    diff.add_argument("--format", choices=("terminal", "markdown"), default="terminal", help="default: terminal")


def add_baseline(commands: Commands[CommandParser]) -> None:
    baseline = commands.add_parser(
        BASELINE,
        help="write a first baseline",
        description="Print a baseline that accepts each failure in a report for 90 days. Add a reason and an owner to "
        "each entry, save the file, and name it in the config: `baseline: FILE`.",
        epilog=examples(
            "merge-gate report baseline merge-gate-report > baseline.yml",
            'merge-gate report baseline --only billing --until 2027-03-31 --owner me --reason "known, see #12"',
        ),
    )
    baseline.add_argument("--only", action="append", default=[], metavar="NAME", help="only this adapter; repeatable")
    baseline.add_argument("--until", metavar="DATE", help="the last day of the entries, such as 2027-03-31")
    baseline.add_argument("--owner", metavar="WHO", default="", help="who is responsible for the entries")
    baseline.add_argument("--reason", metavar="TEXT", default="", help="why the failures are accepted")
    baseline.add_argument("report", metavar="REPORT", nargs="?", default=DEFAULT_OUTPUT, help=_REPORT_OR_DEFAULT)


def show(arguments: argparse.Namespace) -> int:
    from merge_gate.report.stored.stored_report import shown

    return print_document(shown(arguments.report, arguments.format, width=width_of(sys.stdout, WIDEST_TABLE)))


def diff(arguments: argparse.Namespace) -> int:
    from merge_gate.report.stored.stored_report import compared

    return print_document(*compared(arguments.old, arguments.new, arguments.format, width=width_of(sys.stdout)))


def baseline(arguments: argparse.Namespace) -> int:
    from datetime import UTC, datetime

    from merge_gate.report.stored.stored_report import first_baseline, stored

    given = {name: getattr(arguments, name) for name in ("only", "until", "owner", "reason")}
    return print_document(first_baseline(stored(arguments.report), datetime.now(UTC).date(), **given))
