"""`merge-gate demo`: gate adapters that the gate makes itself."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from merge_gate.cli.arguments import DEFAULT_OUTPUT, CommandParser, Commands
from merge_gate.cli.gating import gate_adapters
from merge_gate.cli.output import claimed_output, exit_code
from merge_gate.errors import ExitCode, GateError
from merge_gate.records.options import RunOptions
from merge_gate.run.streams import tell


def add(commands: Commands[CommandParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="see what the gate catches",
        description="Make a tiny base and a handful of good and broken adapters in DIR, and gate them for real.",
    )
    demo.add_argument("directory", nargs="?", metavar="DIR", help="a new directory (default: a temporary one)")


def run(arguments: argparse.Namespace) -> int:
    if arguments.directory is not None:
        _run_demo(arguments.directory, Path(arguments.directory, DEFAULT_OUTPUT))
        tell(f"Its files are yours to play with: merge-gate run {Path(arguments.directory, 'merge-gate.yml')}")
    else:
        with tempfile.TemporaryDirectory(prefix="merge-gate-demo-") as directory:
            _run_demo(directory, None)
        tell("To keep the files and the report, name a new directory: merge-gate demo DIR")
    return ExitCode.PASS


def _run_demo(directory: str, output: Path | None) -> None:
    from merge_gate.config.load_config import load_config
    from merge_gate.demo import make_demo, misjudged

    config = load_config(make_demo(directory))
    if output is None:
        report = gate_adapters(config, RunOptions(device="cpu"))
    else:
        with claimed_output(str(output)) as earlier:
            report = gate_adapters(
                config, RunOptions(device="cpu", output=str(output)), begins=earlier.replace_previous
            )
    if wrong := misjudged(report):
        raise GateError(
            f"the gate did not judge the demo as it should: {', '.join(wrong)}",
            hint="this installation of merge-gate cannot be trusted; please report this, with the output of `pip list`",
        )
    tell(
        f"\nThe gate judged all {len(report.adapters)} entries of the demo as it should. Its own exit code is "
        f"{int(exit_code(report))}: in a workflow, this release would stop here."
    )
