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
        "adapter in a report. Each line has one statement. With --key, each line is a signed DSSE envelope.",
        epilog=examples("merge-gate attest merge-gate-report --key gate.pem")
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
    attest.add_argument(
        "--key", metavar="FILE", help="sign with this private key (PEM; ed25519 or ECDSA); needs the extra `attest`"
    )


def run(arguments: argparse.Namespace) -> int:
    from datetime import UTC, datetime

    from merge_gate.attest.envelope import read_key, signed
    from merge_gate.attest.statement import statements_of

    key = None if arguments.key is None else read_key(arguments.key)
    statements = statements_of(arguments.source, arguments.only, datetime.now(UTC))
    lines = statements if key is None else [signed(statement, key) for statement in statements]
    return print_document("".join(line.decode("ascii") + "\n" for line in lines))
