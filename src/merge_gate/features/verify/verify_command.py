"""`merge-gate verify`: name what a finished model is."""

from __future__ import annotations

import argparse
from typing import Any

from merge_gate._internal.errors import UsageError
from merge_gate._internal.text import foreign
from merge_gate.cli.arguments import CommandParser, Commands, add_appearance, add_output, examples, exit_codes, given
from merge_gate.cli.output import exit_code, view_of
from merge_gate.judging.kinds import ALLOWED, ANSWERS

EXIT_CODES_OF_VERIFY = exit_codes(
    "0  the model is the merge (bit for bit, or in another order of rounding), or it matches its merge-gate.json",
    "1  the model is something else. The report names it",
    "2  usage error: nothing was compared",
    "3  the model could not be compared: a file cannot be read or merged, or a release has too much noise",
)


def add(commands: Commands[CommandParser]) -> None:
    verify = commands.add_parser(
        "verify",
        help="compare a merged model with its base and adapter",
        description="Compare the model in MERGED, tensor by tensor, with the merge of ADAPTER into BASE. The command "
        "names the result: the merge, the unchanged base, an adapter applied twice or at another strength, another "
        "base, and more. In a quantized release, it measures how much of the adapter is there. Without --adapter, it "
        "compares a directory from `merge-gate run --publish` with its own merge-gate.json.",
        usage="%(prog)s MERGED [options]",
        epilog=examples(
            "merge-gate verify ./merged --base ./my-base --adapter ./my-adapter",
            "merge-gate verify ./model-Q4_K_M.gguf --base ./my-base --adapter ./my-adapter",
            "merge-gate verify ./published/my-adapter",
        )
        + EXIT_CODES_OF_VERIFY,
        short=("--base", "--adapter", "--candidate", "--output"),
    )
    verify.add_argument(
        "merged", type=given, metavar="MERGED", help="the merged model: a directory, a Hub id, or a GGUF file"
    )
    verify.add_argument("--base", type=given, metavar="BASE", help="the base: a directory or a Hub id")
    verify.add_argument("--adapter", type=given, metavar="ADAPTER", help="the adapter: a directory or a Hub id")
    verify.add_argument(
        "--candidate",
        action="append",
        default=[],
        type=given,
        metavar="ADAPTER",
        help="another adapter that may have been merged by mistake; repeatable",
    )
    verify.add_argument(
        "--allow",
        action="append",
        default=[],
        type=_kind,
        choices=ALLOWED,
        metavar="KIND",
        help=f"accept this kind of difference; repeatable. Kinds: {', '.join(ALLOWED)}",
    )
    add_output(verify, "merge-gate-verify")
    add_appearance(verify)


def run(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from merge_gate._internal.earlier_reports import refuse_run
    from merge_gate.config.from_arguments import config_of
    from merge_gate.features.verify.misplaced import refuse_exchanged
    from merge_gate.features.verify.verify_flow import Verification, verify_record
    from merge_gate.report.stored.output_directory import refuse_report
    from merge_gate.report.stored.report_files import FORMATS
    from merge_gate.worker.supervisor import WorkerSlot

    refuse_run(Path(arguments.output))
    with WorkerSlot() as worker:
        refuse_exchanged(arguments.merged, arguments.base, arguments.adapter, arguments.candidate)
        if arguments.adapter is None and (arguments.base or arguments.candidate):
            raise UsageError(
                "--adapter is missing",
                hint="give it; without --base and --candidate, the directory is compared with its own record",
            )
        inputs = [arguments.merged, arguments.base, arguments.adapter, *arguments.candidate]
        refuse_report(arguments.output, FORMATS, filter(None, inputs))
        asked: dict[str, Any] = {"allowed": tuple(arguments.allow), "output": arguments.output}
        with view_of(arguments) as view:
            if arguments.adapter is None:
                return exit_code(verify_record(arguments.merged, view=view, **asked))
            worker.start_early()
            config = config_of([arguments.adapter, *arguments.candidate], base=arguments.base)
            return exit_code(Verification(config, arguments.merged, view=view, worker=worker, **asked).compare())


def _kind(text: str) -> str:
    if text in ANSWERS and text not in ALLOWED and not ANSWERS[text].is_good:
        raise argparse.ArgumentTypeError(
            f"{foreign(text)} is never accepted: the merge was then not compared, or every value may differ from it"
        )
    return text
