"""`merge-gate rebuild`: make a published model again, and compare every byte with its merge-gate.json."""

from __future__ import annotations

import argparse

from merge_gate._internal.errors import ExitCode
from merge_gate.cli.arguments import CommandParser, Commands, add_appearance, examples, exit_codes, given
from merge_gate.cli.output import view_of


def add(commands: Commands[CommandParser]) -> None:
    rebuild = commands.add_parser(
        "rebuild",
        help="make a published model again",
        description="Merge a published model again, as its merge-gate.json describes, and compare every byte and every "
        "fact with it. First, the command compares the files of the base and the adapter. It writes the model to DIR, "
        "in a folder with the model's name, only if all of them are the same.",
        epilog=examples("merge-gate rebuild merged/support --output again --base ./my-base --adapter ./my-adapter")
        + exit_codes(
            "0  the model was made again, with the same bytes and the same facts",
            "1  the base, the adapter, or the model has other bytes, or the merge has other facts. The message names "
            "them, and no model is written",
            "2  usage error",
            "3  the model could not be made",
        ),
    )
    rebuild.add_argument(
        "file", type=given, metavar="FILE", help="the merge-gate.json, or the directory that contains it"
    )
    rebuild.add_argument(
        "--output", "-o", required=True, type=given, metavar="DIR", help="the directory to write the model to"
    )
    rebuild.add_argument(
        "--base", type=given, metavar="BASE", help="the base: a directory or a Hub id (default: as in FILE)"
    )
    rebuild.add_argument(
        "--adapter",
        action="append",
        default=[],
        type=given,
        metavar="ADAPTER",
        help="the adapter: a directory or a Hub id (default: as in FILE); repeat it for each adapter of a combination",
    )
    rebuild.add_argument(
        "--allow-pickle", action="store_true", help="read pickled weights if there are no other weights"
    )
    add_appearance(rebuild)


def run(arguments: argparse.Namespace) -> int:
    from merge_gate.run.rebuild import rebuild

    given_here = {"base": arguments.base, "adapters": arguments.adapter, "allow_pickle": arguments.allow_pickle}
    with view_of(arguments) as (view, _):
        return ExitCode.PASS if rebuild(arguments.file, arguments.output, view, **given_here) else ExitCode.FAIL
