"""What the commands that gate adapters share: the configuration that they ask for, and the run with its view."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing
from typing import TYPE_CHECKING, TextIO

from merge_gate.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from merge_gate.records.config import Config
    from merge_gate.records.options import RunOptions
    from merge_gate.records.report import Report
    from merge_gate.worker.supervisor import WorkerSlot


def requested_config(arguments: argparse.Namespace) -> Config:
    """The configuration in the file, or that of the adapters named on the command line."""
    from merge_gate.config.from_arguments import config_of, names_a_file
    from merge_gate.config.load_config import load_config

    options = {name: getattr(arguments, name, None) for name in ("base", "dtype", "quantization")}
    if names_a_file(arguments.names):
        given = [f"--{name}" for name, value in options.items() if value]
        if given:
            raise UsageError(f"{given[0]} is for adapters that are named here", hint="write it into the config instead")
        return load_config(arguments.names[0])
    if getattr(arguments, "container", False):
        raise UsageError("--container needs a config", hint="write one with: merge-gate init DIR")
    dtypes = [word.strip() for word in (options["dtype"] or "").split(",") if word.strip()]
    return config_of(arguments.names, base=options["base"], dtypes=dtypes, quantization=options["quantization"])


def gate_adapters(
    config: Config,
    options: RunOptions,
    *,
    worker: WorkerSlot | None = None,
    begins: Callable[[], object] = lambda: None,
    shows_on: TextIO | None = None,
) -> Report:
    """Gate the adapters, with a view. The result is shown on `shows_on`, by default on standard output."""
    from merge_gate.run.flow import run_gate
    from merge_gate.run.view import make_view

    with closing(make_view(shows_on or sys.stdout, sys.stderr, env=os.environ)) as view:
        return run_gate(config, options, view=view, worker=worker, begins=begins)
