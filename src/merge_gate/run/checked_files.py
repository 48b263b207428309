"""The flow of `merge-gate check`: judges the files of adapters and bases, and merges nothing.

In: a configuration. Out: reports on the files alone. It imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from merge_gate import __version__
from merge_gate.files.resolve import Fetching, Inputs
from merge_gate.judging import adapter_report
from merge_gate.records.config import Config
from merge_gate.records.report import TOOL, AdapterReport, Report, Tool
from merge_gate.report.wording.explanations import linked
from merge_gate.run.groups import headers_timeout_s
from merge_gate.run.selection import select
from merge_gate.run.tally import config_file, environment_of
from merge_gate.run.view import View


def check_files(config: Config, *, view: View | None = None, only: tuple[str, ...] = ()) -> Iterator[AdapterReport]:
    """Judge the files of the adapters, and of bases that are local directories, without torch."""
    specs = select(config, only)
    inputs = Inputs(config, Fetching(notify=(view or View()).note, reads_values=True), timeout_s=headers_timeout_s)
    return (adapter_report.files_report(inputs.checked(spec)) for spec in specs)


def report_on_files(config: Config, adapters: Sequence[AdapterReport]) -> Report:
    """The report of `merge-gate check`, which merges nothing and accepts no failure."""
    return Report(
        complete=True,
        tool=Tool(name=TOOL, version=__version__),
        environment=environment_of("cpu"),
        config=config_file(config, os.environ),
        files_only=True,
        adapters=tuple(map(linked, adapters)),
    )
