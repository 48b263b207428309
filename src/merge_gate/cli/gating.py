"""The run of a command that gates adapters, with its view."""

from __future__ import annotations

import os
import sys
from contextlib import closing
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable

    from merge_gate.records.config import Config
    from merge_gate.records.options import RunOptions
    from merge_gate.records.report import Report
    from merge_gate.worker.supervisor import WorkerSlot


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
