"""A run that is a shard of a larger one: it has some of the adapters, and its report says which."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from merge_gate.features.shards.partition import part_of
from merge_gate.run.feature import Feature

if TYPE_CHECKING:
    from merge_gate.records.report import Report, Shard
    from merge_gate.run.flow import Run


def join(run: Run) -> Feature:
    """The shard of a run, which gets its adapters."""
    run.specs, shard = part_of(run.config, run.specs, run.options.features["shard"])
    return ShardRun(run, shard)


class ShardRun(Feature):
    """One shard. The positions of its entries and bases are those in the whole run."""

    def __init__(self, run: Run, shard: Shard) -> None:
        self._run, self._shard = run, shard

    def add_to(self, report: Report) -> Report:
        bases_from = tuple(self._shard.positions[index] for index in self._run.tally.first_entries())
        return replace(report, shard=replace(self._shard, bases_from=bases_from))
