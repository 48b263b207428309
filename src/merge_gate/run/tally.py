"""What is known of a run by now, and the report that can be made of it at any moment.

In: entries, their verdicts as they are reached, bases as they are loaded, the device. Out: counts, and a `Report`.
Decides nothing, and knows neither files nor worker.

1. An entry has its place in the whole run's list, of which this run may be a shard.
2. A base is listed once for each class that it was loaded as (one without a head has fewer parameters), at the place of
   the first entry that was merged into it.
"""

from __future__ import annotations

import datetime as dt
import platform
from dataclasses import replace
from typing import TYPE_CHECKING

from merge_gate import __version__
from merge_gate.cache.key import libraries
from merge_gate.judging.baseline import accept
from merge_gate.records.report import AdapterReport, BaseReport, Environment, Report, Sandbox, Shard
from merge_gate.records.terms import Verdict
from merge_gate.shards.base_order import Used, in_order

if TYPE_CHECKING:
    from collections.abc import Callable

    from merge_gate.records.config import Config
    from merge_gate.records.files import Entry


class Tally:
    """One run. `digest_of` knows the digest of the base in a directory, or None while it has not been taken."""

    def __init__(
        self, config: Config, shard: Shard | None, *, device: str, digest_of: Callable[[str], str | None]
    ) -> None:
        self._config, self._shard, self._digest_of = config, shard, digest_of
        self._today = dt.datetime.now(dt.UTC).date()
        self._environment = _environment(device)
        self._reports: dict[int, AdapterReport] = {}
        self._bases: dict[tuple[str, BaseReport], int] = {}
        self.entries: list[Entry] = []

    @property
    def total(self) -> int:
        return len(self.entries)

    @property
    def judged(self) -> int:
        return len(self._reports)

    @property
    def failed(self) -> int:
        return sum(one.verdict is Verdict.FAILED for one in self._reports.values())

    @property
    def sandbox(self) -> Sandbox:
        return self._environment.sandbox

    def merged_on(self, device: str, name: str, sandbox: Sandbox | None = None) -> None:
        """Note what verdicts were reached on, and what the worker was kept from, where there is one."""
        self._environment = replace(
            self._environment, device=device, device_name=name, sandbox=sandbox or self._environment.sandbox
        )

    def settle(self, index: int, report: AdapterReport) -> None:
        """The line of an entry, in the place of one that it had."""
        self._reports[index] = report

    def use(self, directory: str, base: BaseReport, index: int) -> None:
        """The entry was, or will be, merged into this base."""
        position = self._shard.positions[index] if self._shard is not None else index
        self._bases[directory, base] = min(position, self._bases.get((directory, base), position))

    def report(self, *, complete: bool = False) -> Report:
        """The report of now; `complete` where the run has come to its end."""
        bases = in_order(
            Used(base=replace(base, sha256=self._digest_of(directory)), position=position)
            for (directory, base), position in self._bases.items()
        )
        adapters = tuple(self._reports[index] for index in sorted(self._reports))
        adapters, baseline = accept(adapters, self._config.baseline, self._today)
        return Report(
            complete=complete,
            tool_version=__version__,
            environment=self._environment,
            config_path=self._config.path,
            config_sha256=self._config.sha256,
            bases=tuple(one.base for one in bases),
            adapters=adapters,
            shard=self._shard and replace(self._shard, bases_from=tuple(one.position for one in bases)),
            baseline=baseline,
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
