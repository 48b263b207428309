"""`merge-gate schema`: print a JSON Schema."""

from __future__ import annotations

import argparse
import json

from merge_gate.cli.arguments import CommandParser, Commands
from merge_gate.cli.output import print_document


def add(commands: Commands[CommandParser]) -> None:
    schema = commands.add_parser(
        "schema", help="print a JSON Schema", description="Print the JSON Schema of the config or of report.json."
    )
    schema.add_argument("document", choices=("config", "report"), help="which one")


def run(arguments: argparse.Namespace) -> int:
    if arguments.document == "config":
        from merge_gate.config.load_config import config_schema as schema
    else:
        from merge_gate.report.formats.schema import report_schema as schema
    return print_document(json.dumps(schema(), indent=2) + "\n")
