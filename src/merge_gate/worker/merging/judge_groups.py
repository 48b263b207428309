"""Divides the tasks of groups by the class of their base, loads each base, and merges its tasks, in passes or in turn.

In: groups of one base, which differ in dtype only. Out: events. It runs confined.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from merge_gate.engine.base import accounting
from merge_gate.engine.base.accounting import Account
from merge_gate.engine.base.loaded_base import ModelClass
from merge_gate.engine.base.model_class import model_class_for, read_config
from merge_gate.engine.tensors.placement import compute_in_full_precision, confirm_card
from merge_gate.worker.batches import batches as batches_of
from merge_gate.worker.merging import passes
from merge_gate.worker.merging.group_bases import GroupBase, GroupBases
from merge_gate.worker.merging.one_merge import judge_each
from merge_gate.worker.protocol import (
    BaseLoaded,
    BaseLoading,
    BaseMeasured,
    Event,
    Group,
    Job,
    Merged,
    Unjudged,
    undecided,
)


def judge_pinned(groups: dict[int, Group], bases: GroupBases) -> Iterator[Event]:
    """Load the base of these groups once for each class, and merge each task into it."""
    compute_in_full_precision()
    to_load, unknown = _by_class(groups, bases.job)
    yield from unknown
    announced = next(iter(groups)) if not unknown else None
    skeletons: list[GroupBase] = []
    for load in to_load:
        if announced != load.position:
            yield BaseLoading(group=load.position)
        announced = None
        started = time.perf_counter()
        try:
            account = bases.account(load)
            refused = _refused_as_incomplete(load, account)
            yield from refused
            indices = {event.task for event in refused}
            load.tasks = [classed for classed in load.tasks if classed[0].index not in indices]
            if not load.tasks:
                continue
            bases.load(load, account)
        except Exception as error:
            confirm_card(bases.job.device)
            load.loaded = None
            yield from undecided((task for task, _ in load.tasks), error, load.group)
            continue
        yield from _announced(load, time.perf_counter() - started)
        if not load.is_skeleton:
            yield from _judge_tasks([load], bases)
        elif skeletons and not passes.fit([*skeletons, load]):
            yield from _judge_tasks(skeletons, bases)
            skeletons = [load]
        else:
            skeletons.append(load)
    if skeletons:
        yield from _judge_tasks(skeletons, bases)


def _by_class(groups: dict[int, Group], job: Job) -> tuple[list[GroupBase], list[Unjudged]]:
    """The loads that the groups need, and the tasks whose class is not known."""
    group_bases: dict[tuple[int, ModelClass], GroupBase] = {}
    unknown: list[Unjudged] = []
    for position, group in groups.items():
        config = None  # read once: it takes 1.6 ms
        for task in group.tasks:
            try:
                config = config or read_config(group.directory, trust_remote_code=job.trust_remote_code)
                model_class = model_class_for(
                    group.directory,
                    task.files[0],
                    group.files.tensors,
                    trust_remote_code=job.trust_remote_code,
                    config=config,
                )
            except Exception as error:
                unknown += undecided([task], error, group)
                continue
            load = GroupBase(position=position, group=group, model_class=model_class)
            group_bases.setdefault((position, model_class), load).tasks.append((task, model_class.instead_of))
    return list(group_bases.values()), unknown


def _refused_as_incomplete(load: GroupBase, account: Account) -> list[Unjudged]:
    """The tasks whose adapters lack the parameters that the base's files lack."""
    if not account.incomplete or account.map is None:
        return []
    lacking = [task for task, _ in load.tasks if not accounting.brings_all(task.files, account.incomplete)]
    fact = accounting.not_stored(load.group.base.name, account.incomplete, account.map, load.group.directory)
    return [Unjudged(task=task.index, refusal=fact) for task in lacking]


def _announced(load: GroupBase, seconds: float) -> Iterator[Event]:
    task, load.is_measured = load.tasks[0][0].index, not load.base.unmeasured()
    yield BaseLoaded(
        group=load.position,
        task=task,
        facts=load.base.facts,
        identity=load.identity,
        measured=load.is_measured,
        seconds=seconds,
    )


def _judge_tasks(loaded: list[GroupBase], bases: GroupBases) -> Iterator[Event]:
    """Merge the adapters of these bases, and send the facts of a base ahead of its first evidence.

    No other code may keep a base that takes memory, so that it is released before the next load.
    """
    base_of = {task.index: load for load in loaded for task, _ in load.tasks}
    tasks = [classed for load in loaded for classed in load.tasks]
    batches, judge = [[load] for load in sorted(tasks, key=lambda classed: classed[0].turn)], judge_each
    if loaded[0].group.in_passes:
        batches, judge = list(batches_of(tasks)), passes.judge_batch
    for batch in batches:
        for load in loaded:
            load.base.weights.keeps &= batch is not batches[-1]
        for event in judge(batch, base_of, bases):
            confirm_card(bases.job.device)
            if isinstance(event, Merged) and not (load := base_of[event.task]).is_measured:
                load.is_measured = True
                yield BaseMeasured(group=load.position, task=event.task, facts=load.base.facts)
            yield event
    for load in loaded:
        bases.keep_figures(load.base)
        load.release()
