"""`merge-gate report combine`: combine the reports of all shards."""

from __future__ import annotations

import argparse

from merge_gate.cli.arguments import EXIT_CODES, CommandParser, Commands, add_appearance, add_output, examples
from merge_gate.cli.output import exit_code, view_of


def add(commands: Commands[CommandParser]) -> None:
    combine = commands.add_parser(
        "report combine",
        help="combine the reports of all shards",
        description="Combine the reports of all shards of a run (`merge-gate run --shard I/N`) into one report. There "
        "is no verdict (exit code 3) if a shard is missing, repeated, incomplete, or from another config, version, or "
        "set of shards.",
        epilog=examples("merge-gate report combine shards --output merge-gate-report") + EXIT_CODES,
    )
    combine.add_argument(
        "directories",
        nargs="+",
        metavar="DIR",
        help="the output directory of a shard, or a directory that contains several of them",
    )
    add_output(combine)
    add_appearance(combine)


def run(arguments: argparse.Namespace) -> int:
    """The shards are read before the report of an earlier run is moved."""
    from merge_gate.features.shards.combined import combined, refuse_overwriting, reports_in
    from merge_gate.report.stored.output_directory import begun_run
    from merge_gate.report.stored.report_files import write_report

    reports = reports_in(arguments.directories)
    refuse_overwriting(reports, arguments.output)
    report = combined(reports)
    with begun_run(arguments.output), view_of(arguments) as view:
        write_report(report, arguments.output)
        view.finish(report, arguments.output)
    return exit_code(report)
