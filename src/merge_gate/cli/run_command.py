"""`merge-gate run`: gate adapters here, in a container, or on a Ray cluster."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from merge_gate._internal.errors import UsageError
from merge_gate._internal.text import size_bytes
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
    given,
    requested_config,
)
from merge_gate.cli.output import deliver, gate_adapters, print_document
from merge_gate.records.options import RunOptions, is_device
from merge_gate.records.terms import Access, ForwardMode, Read
from merge_gate.run.streams import say, width_of


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
    run.add_argument(
        "--access",
        choices=[one.value for one in Access],
        help="how to read the weights of a base on the Hub: download them, stream them without using the disk, or "
        "stream them only if the disk is too small (auto) (default: as in the config, or auto)",
    )
    run.add_argument(
        "--read",
        choices=[one.value for one in Read],
        help="read every tensor of a base (whole), or only the tensors that adapters touch (touched). The value "
        "touched needs the record of an earlier whole read in --cache. The value auto means touched for a base that is "
        "not memory-mapped (default: as in the config, or auto)",
    )
    run.add_argument(
        "--forward",
        choices=[one.value for one in ForwardMode],
        help="run base and adapter on made-up inputs, and check what their modules return: if activations can leave "
        "the dtype (auto), never (off), or judge no adapter without it (required) (default: as in the config, or auto)",
    )
    published = run.add_argument_group("publish the merged models")
    published.add_argument(
        "--publish",
        type=given,
        metavar="DIR",
        help="write the merged model of each adapter that passes to DIR/NAME (default: as in the config)",
    )
    published.add_argument(
        "--max-shard-size",
        type=_size_argument,
        metavar="SIZE",
        help="the maximum size of the tensors in one file, such as 5GB (default: the same files as the base)",
    )
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
    run.add_argument(
        "--shard",
        type=_shard_argument,
        metavar="I/N",
        help="run only part I of N on this machine. With N alone, I comes from JOB_COMPLETION_INDEX, which starts at "
        "0. `merge-gate report combine` combines the reports",
    )
    reused = run.add_argument_group("verdicts of earlier runs", "reused if nothing that affects them has changed")
    reused.add_argument("--cache", metavar="DIR", help="store verdicts in DIR, and reuse those that are there")
    reused.add_argument(
        "--refresh",
        action="store_true",
        help="ignore stored verdicts and check everything again; --cache stores the new verdicts",
    )
    cluster = run.add_argument_group("on a Ray cluster", "needs the extra `ray`")
    cluster.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="merge on the Ray cluster at HOST:PORT, or on the cluster that `auto` finds. Without ADDRESS (then --ray "
        "must be the last argument), start a cluster on this machine for this run",
    )
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
        if _starts_early(arguments):
            worker.start_early()
        from merge_gate.report.stored.output_directory import refuse_report
        from merge_gate.report.stored.report_files import FORMATS, refuse_copies, remove_copies

        refuse_report(arguments.output, FORMATS, arguments.names)
        refuse_copies(arguments.report, arguments.output)
        if arguments.container:
            return _run_in_container(arguments)
        config = requested_config(arguments)
        if arguments.image or arguments.gpus != "auto":
            hint = "add --container, or use --device"
            raise UsageError("--image and --gpus belong to --container", hint=hint)
        options, ray = _options(arguments), _ray(arguments)
        begins = partial(remove_copies, arguments.report)
        report = gate_adapters(config, options, arguments, worker=worker, begins=begins, ray=ray)
        return deliver(report, arguments.report)


def _plan(arguments: argparse.Namespace) -> int:
    from merge_gate.run.planned_run import plan_run

    if arguments.container:
        raise UsageError("--plan is for a run that is not in a container", hint="omit --container: nothing is loaded")
    config, options = requested_config(arguments), _options(arguments)
    return print_document(plan_run(config, options, lambda line: say(f"  {line}"), width=width_of(sys.stdout)))


def _starts_early(arguments: argparse.Namespace) -> bool:
    """Whether the worker imports while the configuration is read.

    If the cache may hold every verdict, a worker on the only core would just slow the lookup.
    """
    if arguments.container or arguments.ray is not None:
        return False
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)  # not on macOS
    return not arguments.cache or arguments.refresh or len(cores) > 1


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

    requested_config(arguments)
    if arguments.ray is not None:
        raise UsageError("--ray is for a run that is not in a container", hint="omit --container")
    more = [word for name in arguments.only for word in ("--only", name)]
    more += ["--refresh"] if arguments.refresh else []
    for name in ("access", "forward", "policy", "read"):
        more += [f"--{name}", value] if (value := getattr(arguments, name)) else []
    more += ["--max-shard-size", f"{arguments.max_shard_size / 1000:.3f}KB"] if arguments.max_shard_size else []
    if shard := _shard(arguments):
        more += ["--shard", "{}/{}".format(*shard)]
    run = local_run(
        arguments.names[0],
        output=arguments.output,
        device=arguments.device,
        arguments=more,
        image=arguments.image,
        gpus=arguments.gpus,
        cache=arguments.cache,
        publish=arguments.publish,
        environ=os.environ,
        begins=begins,
    )

    stream = sys.stderr if is_any_printed(arguments.report) else sys.stdout

    def write(log: bytes) -> None:
        stream.buffer.write(log)
        stream.buffer.flush()

    return run_in_container(run, write)


def _options(arguments: argparse.Namespace) -> RunOptions:
    return RunOptions(
        device=arguments.device,
        output=arguments.output,
        only=tuple(arguments.only),
        access=arguments.access and Access(arguments.access),
        read=arguments.read and Read(arguments.read),
        publish=arguments.publish,
        max_shard_bytes=arguments.max_shard_size,
        shard=_shard(arguments),
        cache=arguments.cache,
        refresh=arguments.refresh,
    )


def _shard(arguments: argparse.Namespace) -> tuple[int, int] | None:
    from merge_gate.features.shards.partition import shard_of

    return shard_of(arguments.shard, os.environ) if arguments.shard is not None else None


def _ray(arguments: argparse.Namespace) -> str | None:
    if arguments.ray is None:
        return None
    from merge_gate.features.ray.run_on_ray import checked_address

    if arguments.shard is not None:
        raise UsageError("--ray makes shards itself", hint="omit --shard or --ray")
    return checked_address(arguments.ray)


def _shard_argument(text: str) -> str:
    if re.fullmatch(r"([1-9]\d{0,4}/)?[1-9]\d{0,4}", text, re.ASCII):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not a shard, expected I/N such as 2/4, counted from 1")


def _size_argument(text: str) -> int:
    try:
        return size_bytes(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, expected one such as 5GB or 500MiB") from None


def _device_argument(text: str) -> str:
    if is_device(text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not one of auto, cpu, cuda, cuda:N")
