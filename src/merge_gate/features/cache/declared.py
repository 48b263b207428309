"""What other code knows of the cache: its options, and when a run asks for it."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from merge_gate.records.config import Config
    from merge_gate.records.options import RunOptions

SECRET = "MERGE_GATE_CACHE_KEY"  # noqa: S105 - the name of a variable
GONE = {"--resume": "use --cache DIR, also in the run that may be killed; it does the same"}


def add_last_options(run: argparse.ArgumentParser) -> None:
    reused = run.add_argument_group("verdicts of earlier runs", "reused if nothing that affects them has changed")
    reused.add_argument("--cache", metavar="DIR", help="store verdicts in DIR, and reuse those that are there")
    reused.add_argument(
        "--refresh",
        action="store_true",
        help="ignore stored verdicts and check everything again; --cache stores the new verdicts",
    )


def is_requested(config: Config, options: RunOptions) -> bool:  # noqa: ARG001 - no key of the configuration asks for it
    """Whether a run has a cache, or a secret for one. A secret that is too short is refused in both cases."""
    return options.features.get("cache") is not None or bool(os.environ.get(SECRET))


def after_stop(arguments: argparse.Namespace) -> str:
    """How a run that was stopped continues."""
    if arguments.cache:
        return "the same command continues from there"
    return "add --cache DIR to the next run: if that is stopped, the same command continues from there"


def starts_late(arguments: argparse.Namespace) -> bool:
    """If the cache may hold every verdict, a worker on the only core would just slow the lookup."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)  # not on macOS
    return bool(arguments.cache) and not arguments.refresh and len(cores) == 1
