"""`merge-gate run`: gate adapters here, in a container, or on a Ray cluster."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate._internal.errors import UsageError
from merge_gate._internal.text import foreign
from merge_gate.cli.arguments import (
    EXIT_CODES,
    CommandParser,
    Commands,
    add_appearance,
    add_named_options,
    add_names,
    add_output,
    add_reports,
    examples,
    requested_config,
)
from merge_gate.cli.output import deliver, gate_adapters, print_document
from merge_gate.records.config import FILE_KEYS
from merge_gate.records.features import WordKey, declared, declared_keys
from merge_gate.records.options import RunOptions, is_device
from merge_gate.run.streams import say, width_of

if TYPE_CHECKING:
    from merge_gate.records.config import Config


def add(commands: Commands[CommandParser]) -> None:
    run = commands.add_parser(
        "run",
        help="merge and check adapters",
        description="Merge and check every adapter that CONFIG lists, or the adapters that you name: directories, "
        "globs, or Hub ids. The command writes report.json, and the same report for people and other tools, to the "
        "output directory.",
        usage="%(prog)s [CONFIG | ADAPTER ...] [options]",
        epilog=examples(
            "merge-gate run",
            "merge-gate run ./my-adapter --base ./my-base --dtype bfloat16,float16",
            "merge-gate run 'adapters/*' --cache .cache --report junit=tests.xml",
            "merge-gate run merge-gate.yml --only support --shard 2/4",
        )
        + EXIT_CODES,
        short=("--base", "--dtype", "--expect", "--output", "--report", "--publish", "--plan", "--cache"),
    )
    add_names(run)
    add_named_options(run)
    run.add_argument("--device", default="auto", type=_device_argument, help="auto (default), cpu, cuda or cuda:N")
    add_output(run)
    add_reports(run)
    for key, row in {**declared_keys("BASE_KEYS"), **FILE_KEYS}.items():
        run.add_argument(f"--{key}", choices=[word.value for word in row.words], help=row.meaning)
    for add_options in declared("add_options"):
        add_options(run)
    run.add_argument(
        "--plan",
        action="store_true",
        help="show what the run would read, download, and write, and exit without merging anything",
    )
    run.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="merge and check only this adapter; repeatable"
    )
    run.add_argument(
        "--policy",
        choices=("release",),
        help="the strict preset for releases: more warnings are errors, and what is on the Hub must be pinned "
        "(default: as in the config)",
    )
    for add_options in declared("add_last_options"):
        add_options(run)
    add_appearance(run)
    container = run.add_argument_group("in a container", "needs a Docker or Podman engine, and the extra `launcher`")
    container.add_argument("--container", action="store_true", help="run inside the released container image")
    container.add_argument(
        "--image", default="", metavar="REF", help="use another image (default: the image of this version)"
    )
    container.add_argument(
        "--gpus",
        default="auto",
        metavar="WHICH",
        help="GPUs for the container: auto (default), none, all, or indices such as 0,1",
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.plan:
        return _plan(arguments)
    from merge_gate.worker.supervisor import WorkerSlot

    with WorkerSlot() as worker:
        if not (arguments.container or any(starts_late(arguments) for starts_late in declared("starts_late"))):
            worker.start_early()  # it imports while the configuration is read
        from merge_gate.report.stored.output_directory import refuse_report
        from merge_gate.report.stored.report_files import FORMATS, refuse_copies, remove_copies

        refuse_report(arguments.output, FORMATS, arguments.names)
        refuse_copies(arguments.report, arguments.output)
        if arguments.container:
            return _run_in_container(arguments)
        config = _config(arguments)
        if arguments.image or arguments.gpus != "auto":
            hint = "add --container, or use --device"
            raise UsageError("--image and --gpus belong to --container", hint=hint)
        begins, options = partial(remove_copies, arguments.report), _options(arguments)
        report = gate_adapters(config, options, arguments, worker=worker, begins=begins)
        return deliver(report, arguments.report)


def _plan(arguments: argparse.Namespace) -> int:
    from merge_gate.run.planned_run import plan_run

    if arguments.container:
        raise UsageError("--plan is for a run that is not in a container", hint="omit --container: nothing is loaded")
    config, options = _config(arguments), _options(arguments)
    return print_document(*plan_run(config, options, lambda line: say(f"  {line}"), width=width_of(sys.stdout)))


def _run_in_container(arguments: argparse.Namespace) -> int:
    from merge_gate.report.stored.output_directory import refuse_other_kinds
    from merge_gate.report.stored.report_files import remove_copies
    from merge_gate.report.stored.stored_report import stored_if_any

    refuse_other_kinds(Path(arguments.output))
    has_begun = False

    def begins() -> None:
        nonlocal has_begun
        remove_copies(arguments.report)
        has_begun = True

    code = _in_container(arguments, begins)
    if has_begun and (report := stored_if_any(arguments.output)) is not None:
        deliver(report, arguments.report)
    return code


def _in_container(arguments: argparse.Namespace, begins: Callable[[], object]) -> int:
    from merge_gate.action.docker.launcher import local_run, run_in_container
    from merge_gate.report.stored.report_files import is_any_printed

    _config(arguments)
    given = vars(arguments)
    more = [word for name in arguments.only for word in ("--only", name)]
    more += ["--refresh"] if given.get("refresh") else []
    for name in ("policy", *declared_keys("BASE_KEYS"), *FILE_KEYS):
        more += [f"--{name}", value] if (value := given.get(name)) else []
    more += ["--max-shard-size", f"{size / 1000:.3f}KB"] if (size := given.get("max_shard_size")) else []
    more += ["--shard", "{}/{}".format(*shard)] if (shard := given.get("shard")) else []
    run = local_run(
        arguments.names[0],
        output=arguments.output,
        device=arguments.device,
        arguments=more,
        image=arguments.image,
        gpus=arguments.gpus,
        cache=given.get("cache"),
        publish=given.get("publish"),
        environ=os.environ,
        begins=begins,
    )

    stream = sys.stderr if is_any_printed(arguments.report) else sys.stdout

    def write(log: bytes) -> None:
        stream.buffer.write(log)
        stream.buffer.flush()

    return run_in_container(run, write)


def _config(arguments: argparse.Namespace) -> Config:
    """The configuration, with what the options of features say instead."""
    config = requested_config(arguments)
    of_base, of_adapter = _given(declared_keys("BASE_KEYS"), arguments), _given(FILE_KEYS, arguments)
    if of_base or of_adapter:
        specs = (replace(spec, base=replace(spec.base, **of_base), **of_adapter) for spec in config.adapters)
        config = replace(config, adapters=tuple(specs))
    for configured in declared("configured"):
        config = configured(config, arguments)
    return config


def _given(keys: Mapping[str, WordKey], arguments: argparse.Namespace) -> dict[str, Any]:
    return {key: row.words(word) for key, row in keys.items() if (word := getattr(arguments, key))}


def _options(arguments: argparse.Namespace) -> RunOptions:
    only, features = tuple(arguments.only), vars(arguments)
    return RunOptions(device=arguments.device, output=arguments.output, only=only, features=features)


def _device_argument(text: str) -> str:
    if is_device(text):
        return text
    raise argparse.ArgumentTypeError(f"{foreign(text)} is not one of auto, cpu, cuda, cuda:N")
