"""`merge-gate demo`: gate adapters that the gate makes itself."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from merge_gate._internal.errors import ExitCode, GateError
from merge_gate._internal.text import wrapped
from merge_gate.cli.arguments import DEFAULT_OUTPUT, CommandParser, Commands, add_appearance, examples
from merge_gate.cli.output import exit_code, gate_adapters
from merge_gate.records.options import RunOptions
from merge_gate.run.streams import tell, width_of

DEFAULT_DIRECTORY = "merge-gate-demo"


def add(commands: Commands[CommandParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="see what the gate catches",
        description="Make a tiny base and several good and broken adapters in DIR, then merge and check them. The "
        "files and the report stay in DIR.",
        epilog=examples("merge-gate demo", "merge-gate demo ./try"),
    )
    demo.add_argument(
        "directory",
        nargs="?",
        default=DEFAULT_DIRECTORY,
        metavar="DIR",
        help=f"a new directory (default: {DEFAULT_DIRECTORY})",
    )
    add_appearance(demo)


def run(arguments: argparse.Namespace) -> int:
    from merge_gate.config.load_config import load_config
    from merge_gate.demo import make_demo, misjudged

    output = str(Path(arguments.directory, DEFAULT_OUTPUT))
    config = load_config(make_demo(arguments.directory))
    report = gate_adapters(config, RunOptions(device="cpu", output=output), arguments)
    if wrong := misjudged(report):
        raise GateError(
            f"the gate did not judge the demo as it should: {', '.join(wrong)}",
            hint="this installation of merge-gate cannot be trusted; please report this, with the output of `pip list`",
        )
    closing = (
        f"The gate judged all {len(report.adapters)} merges of the demo as it should. Its own exit code is "
        f"{int(exit_code(report))}: in a workflow, this release would stop here."
    )
    tell("\n".join(["", *wrapped(closing, width_of(sys.stdout))]))
    tell(f"Change its files and run it again: merge-gate run {shlex.quote(config.label)}")
    tell("Now yours: merge-gate run ./my-adapter --base ./my-base")
    return ExitCode.PASS
