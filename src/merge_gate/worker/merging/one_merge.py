"""Merges one task into its loaded base, with the consumers that the task asks for.

In: a task and the `GroupBase` that has its base. Out: an event with its evidence, or with a reason why it has none.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from merge_gate.engine import adapter_evidence
from merge_gate.engine.adapter_evidence import MergeRequest
from merge_gate.engine.consumer import Consumer
from merge_gate.records.features import part
from merge_gate.records.measured import Evidence
from merge_gate.records.refusals import Refused
from merge_gate.worker.memory import MemoryGroup
from merge_gate.worker.merging.group_bases import ClassedTask, GroupBase, GroupBases
from merge_gate.worker.merging.pattern_trial import try_patterns
from merge_gate.worker.pinned import pinned_adapter
from merge_gate.worker.protocol import (
    Event,
    ForwardRunning,
    Listener,
    Merged,
    MergeProgressed,
    MergeStarted,
    Task,
    undecided,
)

PROGRESS_S = 0.1
"""The least time between two events of progress: showing one takes time from a core that merges."""


def judge_each(batch: list[ClassedTask], base_of: dict[int, GroupBase], bases: GroupBases) -> Iterator[Event]:
    """Merge these tasks one after another."""
    for task, instead_of in batch:
        yield MergeStarted(task=task.index)
        yield _judge_task(task, instead_of, base_of[task.index], bases)


def request_of(
    task: Task, load: GroupBase, pinned: contextlib.ExitStack, progress: Callable[[int, int, str], None]
) -> MergeRequest:
    """The task on the files that were hashed, once its regular expressions have been tried on the base's names."""
    files = tuple(pinned.enter_context(pinned_adapter(member)) for member in task.files)
    names = [name for name, _ in load.base.model.named_modules()]
    for member in files:
        try_patterns(member.config.patterns, names)
    return MergeRequest(
        base=load.base,
        members=files,
        combine=task.combine,
        measure_options=task.measure_options,
        progress=progress,
        free_bytes=MemoryGroup().left_bytes(),
        no_forward=task.no_forward or "",
    )


def with_consumers(
    request: MergeRequest, task: Task, load: GroupBase, bases: GroupBases, pinned: contextlib.ExitStack
) -> MergeRequest:
    """The request with the consumers that the task asks for, in the place of those of an earlier merge."""
    load.close(task.index)
    for asked in task.consumers:
        consumer = part(asked.feature, "consumer").consumer(asked.settings, task, load, bases, pinned)
        if consumer is not None:
            load.consumers[task.index] = (*load.consumers.get(task.index, ()), consumer)
    if task.no_forward == "":
        load.consumers[task.index] = (*load.consumers.get(task.index, ()), _model_runs(task, load, bases))
    return replace(request, consumers=load.consumers.get(task.index, ()))


def _model_runs(task: Task, load: GroupBase, bases: GroupBases) -> Consumer:
    from merge_gate.engine.forward.model_runs import ModelRuns  # noqa: PLC0415 - not every run needs it

    return ModelRuns(
        lambda is_running: bases.report(ForwardRunning(task=task.index, is_running=is_running)),
        tries_base=load.group.base_run == "alone",
    )


def paced(progress: Listener, task: int) -> Callable[[int, int, str], None]:
    """Report the progress of a merge, but not every module of it."""
    next_s = 0.0

    def report(done: int, total: int, module: str) -> None:
        nonlocal next_s
        if time.monotonic() >= next_s:
            progress(MergeProgressed(task=task, done=done, total=total, module=module))
            next_s = time.monotonic() + PROGRESS_S

    return report


def _judge_task(task: Task, instead_of: str | None, load: GroupBase, bases: GroupBases) -> Event:
    try:
        with contextlib.ExitStack() as pinned:
            try:
                request = request_of(task, load, pinned, paced(bases.report, task.index))
            except Refused as refused:  # by the trial of its regular expressions, before PEFT
                adapter_evidence.measure_wholly(load.base)
                kind, facts = task.files[0].config.peft_type, load.base.facts
                evidence = Evidence(
                    base=facts, peft_type=kind, refusal=refused.refusal, parameters_total=facts.parameters
                )
            else:
                evidence = adapter_evidence.merge(with_consumers(request, task, load, bases, pinned))
        load.finish(task.index, evidence)
    except Exception as error:
        load.close(task.index)
        (event,) = undecided([task], error)
        return event
    return Merged(task=task.index, evidence=replace(evidence, instead_of=instead_of))
