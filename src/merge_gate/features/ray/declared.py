"""The option of `merge-gate run` for a Ray cluster."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from merge_gate._internal.errors import GateError, UsageError
from merge_gate._internal.text import foreign

if TYPE_CHECKING:
    from merge_gate.records.config import Config
    from merge_gate.records.options import RunOptions

WITHOUT_VARIABLE = ("--ray",)
LOCAL = ""
"""The address of a new cluster on this machine, for this run."""

_ADDRESS = re.compile(r"auto|[A-Za-z0-9._-]+:\d{1,5}|\[[0-9A-Fa-f:]+\]:\d{1,5}")


def add_last_options(run: argparse.ArgumentParser) -> None:
    cluster = run.add_argument_group("on a Ray cluster", "needs the extra `ray`")
    cluster.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="merge on the Ray cluster at HOST:PORT, or on the cluster that `auto` finds. Without ADDRESS (then --ray "
        "must be the last argument), start a cluster on this machine for this run",
    )


def configured(config: Config, arguments: argparse.Namespace) -> Config:
    """The configuration.

    Raises:
        UsageError: the run is in a container, or it is a shard.
        GateError: the option is no address.
    """
    if arguments.ray is None or arguments.plan:
        return config
    if arguments.container:
        raise UsageError("--ray is for a run that is not in a container", hint="omit --container")
    if getattr(arguments, "shard", None) is not None:
        raise UsageError("--ray makes shards itself", hint="omit --shard or --ray")
    if arguments.ray != LOCAL and not _ADDRESS.fullmatch(arguments.ray):
        raise GateError(
            f"--ray {foreign(arguments.ray)} is not the address of a Ray cluster, expected HOST:PORT or auto",
            hint="put --ray ADDRESS after all other arguments; for a cluster on this machine, end with --ray alone",
        )
    return config


def starts_late(arguments: argparse.Namespace) -> bool:
    return arguments.ray is not None


def is_requested(config: Config, options: RunOptions) -> bool:  # noqa: ARG001
    return options.features.get("ray") is not None and not options.is_plan
