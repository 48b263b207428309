"""Asks the worker to run base and adapters as models.

In: the groups of a run. Out: the groups, with a consumer for each task whose model may run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from merge_gate.records.terms import ForwardMode
from merge_gate.run.feature import Feature
from merge_gate.worker.protocol import ConsumerSpec, Group, Task

if TYPE_CHECKING:
    from merge_gate.run.flow import Run

_PARTLY_READ = "only what adapters touch is read of the base, so it is run only with forward: required"


def join(run: Run) -> ForwardRuns:
    """Models run in this run."""
    return ForwardRuns(run)


class ForwardRuns(Feature):
    """The runs of models, which the worker makes."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def schedule(self, groups: Sequence[Group]) -> Iterator[Group]:
        for group in groups:
            yield replace(group, tasks=tuple(self._with_model(group, task) for task in group.tasks))

    def _with_model(self, group: Group, task: Task) -> Task:
        """Unless that is required, no model is run if that would read more of the base than the merges do."""
        entry = self._run.tally.entries[task.index]
        is_required = entry.spec.forward is ForwardMode.REQUIRED
        partly_read = _PARTLY_READ if group.earlier_figures and group.in_passes and not is_required else ""
        return task.with_consumer(ConsumerSpec(feature="forward", why_not=entry.no_forward or partly_read))
