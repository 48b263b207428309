"""Commands that print reference text: a JSON Schema, the explanation of a check, or a shell's completion."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate._internal.errors import UsageError
from merge_gate.cli.arguments import CommandParser, Commands, examples
from merge_gate.cli.output import print_document
from merge_gate.run.streams import width_of

if TYPE_CHECKING:
    from rich.console import RenderableType

SHELLS = ("bash", "zsh", "tcsh")


def add_explain(commands: Commands[CommandParser]) -> None:
    explain = commands.add_parser(
        "explain",
        help="explain a check or a result of verify",
        description="Explain a check: when it fires, why it matters, what to do, and where it has happened. Also "
        "explain the other findings of a report and the results of `merge-gate verify`. Without CHECK, list all.",
        epilog=examples("merge-gate explain rounding-loss", "merge-gate explain not-carried"),
    )
    explain.add_argument("check", nargs="?", metavar="CHECK", help="the id in the report, such as rounding-loss")


def add_schema(commands: Commands[CommandParser]) -> None:
    schema = commands.add_parser(
        "schema",
        help="print a JSON Schema",
        description="Print the JSON Schema of the config, of report.json, or of a baseline.",
        epilog=examples("merge-gate schema config > merge-gate.schema.json"),
    )
    schema.add_argument("document", choices=("config", "report", "baseline"), help="the document to describe")


def add_completion(commands: Commands[CommandParser]) -> None:
    completion = commands.add_parser(
        "completion",
        help="print a completion script for a shell",
        description="Print a script that completes the commands and options of merge-gate in a shell. Printing the "
        "script needs the extra `completion`; using it does not.",
        epilog=examples('eval "$(merge-gate completion bash)"'),
    )
    completion.add_argument("shell", choices=SHELLS, help="the shell")


def explain(arguments: argparse.Namespace) -> int:
    from merge_gate._internal.text import quoted
    from merge_gate.names.suggestions import nearest
    from merge_gate.report.wording.explanations import explanation, explanations

    if arguments.check is None:
        return print_document(_checks(width_of(sys.stdout)))
    if arguments.check not in explanations():
        hint = nearest(arguments.check, explanations()) or "`merge-gate explain` lists all checks"
        raise UsageError(f"there is no check or finding {quoted(arguments.check)}", hint=hint)
    return print_document(explanation(arguments.check, width_of(sys.stdout)))


def _checks(width: int) -> str:
    from rich.text import Text

    from merge_gate.judging.checks.check import Stage
    from merge_gate.judging.checks.table import CHECKS
    from merge_gate.judging.kinds import ANSWERS, WITHOUT_SETTING
    from merge_gate.report.wording.layout import labeled, laid_out

    tables = {
        f"{title}:": [(name, row.summary) for name, row in CHECKS.items() if row.shown_by is stage]
        for stage, title in (
            (Stage.FILES, "Checks of the adapter's files"),
            (Stage.BASE, "Checks of the base"),
            (Stage.MERGE, "Checks of the merge"),
            (Stage.FORWARD, "Checks of the running model"),
        )
    } | {
        "Findings without a setting:": [(name, row.summary) for name, row in WITHOUT_SETTING.items()],
        "Results of `merge-gate verify`:": [(name, row.summary) for name, row in ANSWERS.items()],
    }
    label_width = max(len(name) for rows in tables.values() for name, _ in rows) + 2
    parts: list[RenderableType] = []
    for title, rows in tables.items():
        parts += [Text(title), labeled(rows, label_width), Text()]
    return laid_out([*parts, Text("For one of them: merge-gate explain NAME")], width)


def schema(arguments: argparse.Namespace) -> int:
    """Print a stored schema, which `make schemas` writes."""
    stored = Path(__file__).parents[1] / "schemas" / f"{arguments.document}.schema.json"
    return print_document(stored.read_text(encoding="ascii"))


def completion(arguments: argparse.Namespace, commands: argparse.ArgumentParser) -> int:
    """Print the script for `commands`, the parser of the whole command line."""
    try:
        import shtab
    except ModuleNotFoundError:
        raise UsageError(
            "the package shtab is not installed, which makes the script",
            hint="install merge-gate again with the extra `completion`: pip install '.[completion]' in its checkout",
        ) from None
    return print_document(shtab.complete(commands, shell=arguments.shell))
