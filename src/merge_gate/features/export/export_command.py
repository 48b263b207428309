"""`merge-gate export`: write an adapter as a plain LoRA, in the form that servers apply alike."""

from __future__ import annotations

import argparse

from merge_gate._internal.errors import ExitCode
from merge_gate._internal.text import counted
from merge_gate.cli.arguments import CommandParser, Commands, add_appearance, examples, exit_codes, given
from merge_gate.cli.output import exit_code, view_of


def add(commands: Commands[CommandParser]) -> None:
    export = commands.add_parser(
        "export",
        help="write an adapter as a plain LoRA, in the form that servers apply alike",
        description="Gate an adapter, and write it to DIR as a plain LoRA: one rank, one scale, and the names of the "
        "class that its users load. The command gates the export as well, and compares both "
        "merges in float32 and in the base's dtype. It writes nothing unless both pass, and the merges have the same "
        "values, except for rounding.",
        usage="%(prog)s ADAPTER [options]",
        epilog=examples("merge-gate export ./my-adapter --base ./my-base --output ./my-adapter-plain")
        + exit_codes(
            "0  the export is in DIR",
            "1  the adapter failed, or no plain LoRA has its effect. The message says why, and nothing is written",
            "2  usage error: nothing was judged",
            "3  the adapter or its export could not be judged or compared",
        ),
    )
    export.add_argument("adapter", type=given, metavar="ADAPTER", help="the adapter: a directory or a Hub id")
    export.add_argument(
        "--base",
        type=given,
        metavar="BASE",
        help="the base: a directory or a Hub id (default: the base in adapter_config.json)",
    )
    export.add_argument(
        "--output", "-o", required=True, type=given, metavar="DIR", help="the directory to write the plain LoRA to"
    )
    export.add_argument("--revision", type=given, metavar="REV", help="commit, tag or branch of an adapter on the Hub")
    export.add_argument(
        "--no-fill",
        action="store_true",
        help="add no pairs of zeros for modules that servers expect next to the adapted ones",
    )
    add_appearance(export)


def run(arguments: argparse.Namespace) -> int:
    from merge_gate.config.exchanged import refuse_exchanged_base
    from merge_gate.features.export.export_flow import export
    from merge_gate.report.wording.untrusted import one_line
    from merge_gate.run.streams import tell

    refuse_exchanged_base("export", arguments.base, [arguments.adapter])
    with view_of(arguments) as view:
        made = export(
            arguments.adapter,
            arguments.output,
            base=arguments.base,
            revision=arguments.revision,
            fill=not arguments.no_fill,
            view=view,
        )
    if made.record is None:
        return exit_code(made.report)
    padded = f", with zeros in {counted(len(made.record.padding), 'module')}" if made.record.padding else ""
    name = one_line(made.record.model_class)
    tell(f"{one_line(arguments.output)} is a plain LoRA with the names of {name}{padded}: load the base as this class")
    for row in made.record.comparisons:
        few = (
            f"{row.differing:,} of {counted(row.values, 'merged value')} differ by rounding (at most {row.largest:.2g})"
        )
        tell(f"{row.dtype}: {few if row.differing else 'its merge has the same bits as that of the adapter'}")
    return ExitCode.PASS
