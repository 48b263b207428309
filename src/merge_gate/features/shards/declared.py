"""The option of `merge-gate run` for one shard of a run."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from merge_gate._internal.errors import UsageError
from merge_gate._internal.text import foreign

if TYPE_CHECKING:
    from merge_gate.records.config import Config
    from merge_gate.records.options import RunOptions

COMMAND = "report combine", "report baseline", ""
WITHOUT_VARIABLE = ("--shard",)
INDEX_VARIABLE = "JOB_COMPLETION_INDEX"
"""Kubernetes sets it in each pod of an Indexed Job. It counts from 0."""


def add_last_options(run: argparse.ArgumentParser) -> None:
    run.add_argument(
        "--shard",
        type=_shard_argument,
        metavar="I/N",
        help="run only part I of N on this machine. With N alone, I comes from JOB_COMPLETION_INDEX, which starts at "
        "0. `merge-gate report combine` combines the reports",
    )


def _shard_argument(text: str) -> str:
    if re.fullmatch(r"([1-9]\d{0,4}/)?[1-9]\d{0,4}", text, re.ASCII):
        return text
    raise argparse.ArgumentTypeError(f"{foreign(text)} is not a shard, expected I/N such as 2/4, counted from 1")


def configured(config: Config, arguments: argparse.Namespace) -> Config:
    """The configuration. The option becomes the numbers of the shard.

    Raises:
        UsageError: there is no such shard.
    """
    if arguments.shard is not None:
        arguments.shard = shard_of(arguments.shard, os.environ)
    return config


def shard_of(text: str, environ: Mapping[str, str]) -> tuple[int, int]:
    """I and N of `I/N`. For `N` alone, I is the number of the pod in a Kubernetes Indexed Job.

    Raises:
        UsageError: I is more than N, or there is no number of a pod.
    """
    first, _, last = text.rpartition("/")
    if not first:
        given = environ.get(INDEX_VARIABLE, "")
        if not given.isdecimal() or not given.isascii():
            raise UsageError(
                f"--shard {text}: {INDEX_VARIABLE} is {foreign(given)}, expected the number of this pod",
                hint="name the shard as I/N, or run in a Kubernetes Job with completionMode: Indexed",
            )
        first = str(int(given[:9]) + 1)
    index, count = int(first), int(last)
    if index > count:
        raise UsageError(f"--shard {index}/{count}: there is no shard {index} of {count}", hint="shards count from 1")
    return index, count


def is_requested(config: Config, options: RunOptions) -> bool:  # noqa: ARG001
    return options.features.get("shard") is not None
