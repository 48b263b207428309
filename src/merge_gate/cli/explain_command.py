"""`merge-gate explain`: what a check means, why it matters, and what to do."""

from __future__ import annotations

import argparse
import shutil
import sys

from merge_gate.cli.arguments import CommandParser, Commands
from merge_gate.cli.output import print_document
from merge_gate.errors import UsageError

WIDEST = 100


def add(commands: Commands[CommandParser]) -> None:
    explain = commands.add_parser(
        "explain",
        help="explain a check",
        description="Explain a check: when it fires, why it matters, what to do, and to whom it happened. Without "
        "CHECK, list all checks.",
    )
    explain.add_argument("check", nargs="?", metavar="CHECK", help="the id of a check, as reports show it")


def run(arguments: argparse.Namespace) -> int:
    from merge_gate.config.suggestions import nearest
    from merge_gate.report.wording.explanations import explanation, explanations
    from merge_gate.text import quoted

    width = min(shutil.get_terminal_size((WIDEST, 0)).columns, WIDEST) if sys.stdout.isatty() else WIDEST
    if arguments.check is None:
        return print_document(_list())
    if arguments.check not in explanations():
        hint = nearest(arguments.check, explanations()) or "`merge-gate explain` lists all checks"
        raise UsageError(f"there is no check {quoted(arguments.check)}", hint=hint)
    return print_document(explanation(arguments.check, width))


def _list() -> str:
    from merge_gate.judging.checks.table import CHECKS

    widest = max(map(len, CHECKS))
    rows = [f"{check:<{widest}}  {row.summary}" for check, row in CHECKS.items()]
    return "\n".join([*rows, "", "For one of them: merge-gate explain CHECK", ""])
