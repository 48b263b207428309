"""Collects a run's results, and builds a `Report` from them at any time.

In: entries, their verdicts as they are reached, bases as they are loaded, and the device. Out: counts and a `Report`.

1. An entry has its position in the whole plan. This run may be a shard of it.
2. A base is listed once for each class that it was loaded as, because one without a head has fewer parameters. Its
   position is that of the first entry merged into it.
"""

from __future__ import annotations

import datetime as dt
import os
import platform
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from merge_gate import __version__
from merge_gate.cache.key import libraries
from merge_gate.judging.baseline import accept
from merge_gate.records.report import (
    TOOL,
    AdapterReport,
    BaseReport,
    ConfigFile,
    Environment,
    Report,
    Sandbox,
    Shard,
    Tool,
)
from merge_gate.records.terms import Verdict
from merge_gate.report.wording.explanations import linked
from merge_gate.shards.base_order import in_order

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from merge_gate.files.base_watch import BaseWatch
    from merge_gate.records.config import Config
    from merge_gate.records.files import Entry


class Tally:
    """The results of one run. The digests of its bases come from `watch`, as soon as they are known."""

    def __init__(self, config: Config, shard: Shard | None, *, device: str, watch: BaseWatch) -> None:
        self._config, self._shard, self._watch = config, shard, watch
        self._today = dt.datetime.now(dt.UTC).date()
        self._config_file = config_file(config, os.environ)
        self._environment = _environment(device)
        self._reports: dict[int, AdapterReport] = {}
        self._bases: dict[tuple[str, BaseReport], tuple[int, str]] = {}
        self.entries: list[Entry] = []

    @property
    def total(self) -> int:
        return len(self.entries)

    @property
    def judged(self) -> int:
        return len(self._reports)

    def is_judged(self, index: int) -> bool:
        """Whether an entry has a verdict: it passed or failed."""
        return index in self._reports and self._reports[index].verdict is not Verdict.ERROR

    @property
    def failed(self) -> int:
        return sum(report.verdict is Verdict.FAILED for report in self._reports.values())

    @property
    def environment(self) -> Environment:
        return self._environment

    @property
    def sandbox(self) -> Sandbox:
        return self._environment.sandbox

    def merged_on(self, device: str, name: str, sandbox: Sandbox | None = None) -> None:
        """Set the device of the report, and with a worker its sandbox."""
        self._environment = replace(
            self._environment, device=device, device_name=name, sandbox=sandbox or self._environment.sandbox
        )

    def settle(self, index: int, report: AdapterReport) -> None:
        """Set or replace the report of an entry."""
        self._reports[index] = linked(report)

    def of(self, index: int) -> AdapterReport | None:
        """The report of an entry, if it has one."""
        return self._reports.get(index)

    def use(self, directory: str, base: BaseReport, index: int) -> None:
        """List a base, which this entry is merged into."""
        base = linked(base)
        position = self._shard.positions[index] if self._shard is not None else index
        use = (position, self.entries[index].spec.name if self.entries else "")
        self._bases[directory, base] = min(use, self._bases.get((directory, base), use))

    def _with_digests(self, directory: str, base: BaseReport) -> BaseReport:
        """Without digests if this run has read a part of a base, and the Hub lists the digests of the whole."""
        if base.record is not None and self._watch.is_only_listed(directory):
            return base
        return replace(base, sha256=self._watch.digest(directory), files=self._watch.files(directory))

    def report(self, *, complete: bool = False) -> Report:
        """The report so far; `complete` at the end of the run."""
        bases = in_order((self._with_digests(directory, base), use) for (directory, base), use in self._bases.items())
        adapters = tuple(self._reports[index] for index in sorted(self._reports))
        adapters, baseline = accept(adapters, self._config.baseline, self._today)
        return Report(
            complete=complete,
            tool=Tool(name=TOOL, version=__version__),
            environment=self._environment,
            config=self._config_file,
            bases=tuple(replace(base, first_adapter=name) for base, (_, name) in bases.items()),
            adapters=adapters,
            shard=self._shard and replace(self._shard, bases_from=tuple(position for position, _ in bases.values())),
            baseline=baseline,
        )


def report_on_files(config: Config, adapters: Sequence[AdapterReport]) -> Report:
    """The report of `merge-gate check`, which merges nothing and accepts no failure."""
    return Report(
        complete=True,
        tool=Tool(name=TOOL, version=__version__),
        environment=_environment("cpu"),
        config=config_file(config, os.environ),
        files_only=True,
        adapters=tuple(map(linked, adapters)),
    )


COMMIT_VARIABLES = ("MERGE_GATE_COMMIT", "GITHUB_SHA", "CI_COMMIT_SHA", "GIT_COMMIT", "BUILD_SOURCEVERSION")
"""Variables that name the commit: the action's, GitHub's (and Gitea's), GitLab's, Jenkins', and Azure's."""
_COMMIT = re.compile(r"[0-9a-fA-F]{7,64}")


def config_file(config: Config, environ: Mapping[str, str]) -> ConfigFile:
    """The configuration of a run that starts now."""
    commits = (environ.get(name, "") for name in COMMIT_VARIABLES)
    return ConfigFile(
        path=config.label,
        sha256=config.sha256,
        read_at=dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit=next((commit for commit in commits if _COMMIT.fullmatch(commit)), None),
        policy=config.policy,
    )


def _environment(device: str) -> Environment:
    versions = libraries()
    return Environment(
        python=platform.python_version(),
        torch=versions["torch"],
        peft=versions["peft"],
        transformers=versions["transformers"],
        bitsandbytes=versions["bitsandbytes"],
        device=device,
    )
