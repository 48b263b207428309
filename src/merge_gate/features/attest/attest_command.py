"""`merge-gate attest`: write in-toto statements about verdicts or a published model. Loads no model."""

from __future__ import annotations

import argparse

from merge_gate.cli.arguments import CommandParser, Commands, examples, exit_codes, given
from merge_gate.cli.output import print_document


def add(commands: Commands[CommandParser]) -> None:
    attest = commands.add_parser(
        "attest",
        help="write an in-toto statement",
        description="Print an in-toto statement about a directory from `merge-gate run --publish`, or about each "
        "adapter in a report. Each line has one statement. It is not signed: `cosign` or `actions/attest` sign it.",
        epilog=examples("merge-gate attest ./published/my-adapter > statement.json")
        + exit_codes(
            "0  the statements were printed",
            "2  usage error, or the directory does not match its merge-gate.json: nothing was printed",
        ),
    )
    attest.add_argument(
        "source", type=given, metavar="REPORT|DIR", help="a published directory, or the report of a run"
    )
    attest.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="attest only this adapter of the report; repeatable"
    )


def run(arguments: argparse.Namespace) -> int:
    from datetime import UTC, datetime

    from merge_gate.features.attest.statement import statements_of

    statements = statements_of(arguments.source, arguments.only, datetime.now(UTC))
    return print_document("".join(statement.decode("ascii") + "\n" for statement in statements))
