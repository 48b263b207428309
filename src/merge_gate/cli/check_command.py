"""`merge-gate check`: judge the configuration and the files. Loads no model."""

from __future__ import annotations

import argparse

from merge_gate._internal.errors import UsageError
from merge_gate.cli.arguments import (
    CommandParser,
    Commands,
    add_appearance,
    add_named_options,
    add_names,
    add_reports,
    examples,
    exit_codes,
    requested_config,
)
from merge_gate.cli.output import deliver, view_of

EXIT_CODES_OF_CHECK = exit_codes(
    "0  the files of every adapter are valid. Nothing was merged",
    "1  the files of at least one adapter failed",
    "2  usage or configuration error: nothing was checked",
    "3  no adapter failed, but at least one could not be judged because of its files or the files of its base",
)


def add(commands: Commands[CommandParser]) -> None:
    check = commands.add_parser(
        "check",
        help="check the config and the files without merging",
        description="Check CONFIG and the files of its adapters, or the files of the adapters that you name: formats, "
        "headers, adapter_config.json, expectations, and NaN and Inf in the adapters' tensors. The command loads no "
        "model and merges nothing.",
        usage="%(prog)s [CONFIG | ADAPTER ...] [options]",
        epilog=examples("merge-gate check", "merge-gate check ./my-adapter --expect r=16 --report sarif=-")
        + EXIT_CODES_OF_CHECK,
    )
    add_names(check)
    add_named_options(check, merges=False)
    add_reports(check)
    check.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="check only this adapter; repeatable"
    )
    add_appearance(check)


def run(arguments: argparse.Namespace) -> int:
    from merge_gate.report.stored.report_files import refuse_copies, remove_copies
    from merge_gate.run.checked_files import check_files, report_on_files

    refuse_copies(arguments.report)
    if any(key == "base-sha256" for key, _ in arguments.expect or ()):
        raise UsageError("check reads no weights of a base, so --expect base-sha256 is for `run`", hint="omit it here")
    config = requested_config(arguments)
    adapters = []
    with view_of(arguments) as view:
        checked = check_files(config, view=view, only=tuple(arguments.only))
        remove_copies(arguments.report)
        for adapter in checked:
            adapters.append(adapter)
            view.show_logs(adapter)
        report = report_on_files(config, adapters)
        view.finish(report, "")
    return deliver(report, arguments.report)
