"""Merges several adapters in one pass over the files of a base that is not in memory.

In: bases as skeletons of one feed, and a batch of their tasks. Out: events. Runs in the worker.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from merge_gate._internal.errors import SourceError
from merge_gate.engine import adapter_evidence
from merge_gate.engine.adapter_evidence import MergeRequest
from merge_gate.engine.base.loaded_base import Base
from merge_gate.records.measured import Evidence
from merge_gate.worker.memory import MemoryGroup
from merge_gate.worker.merging.group_bases import ClassedTask, GroupBase, GroupBases
from merge_gate.worker.merging.one_merge import judge_each, paced, request_of, with_consumers
from merge_gate.worker.protocol import ALONE, Event, InProgress, Listener, Merged, MergeStarted, Task, undecided

SKELETONS_SHARE = 4
"""Skeletons of one pass may fill a quarter of the free memory permanently."""

HASHED_AT_A_TIME = 4
"""How many adapters' files are hashed at a time after a pass, when there is no other work."""


def fit(skeletons: Sequence[GroupBase]) -> bool:
    """Whether these skeletons fit in one pass: permanently filled tensors take memory."""
    room = (MemoryGroup().free_bytes() or 0) // SKELETONS_SHARE
    return sum(load.base.lazy.kept_bytes() for load in skeletons if load.base.lazy is not None) <= room


def judge_batch(batch: list[ClassedTask], base_of: dict[int, GroupBase], bases: GroupBases) -> Iterator[Event]:
    """Merge these tasks, in one pass if they are several. Such a pass measures the skeletons of other tasks as well."""
    others = list({id(load.base): load.base for load in base_of.values() if load.is_skeleton}.values())
    if len(batch) > 1 or (len(others) > 1 and batch[0][0].turn != ALONE):
        first, *further = (task.index for task, _ in batch)
        yield MergeStarted(task=first, others=tuple(further))
        try:
            merged = _merge_together([task for task, _ in batch], base_of, others, bases)
        except SourceError as error:  # of no use to any adapter
            yield from undecided((task for task, _ in batch), error)
            return
        except Exception:  # merged alone, each adapter shows its own error
            merged = (None,) * len(batch)
        for (task, instead_of), evidence in zip(batch, merged, strict=True):
            if evidence is not None:
                _report_work(bases.report, task.index)
                base_of[task.index].finish(task.index, evidence)
                yield Merged(task=task.index, evidence=replace(evidence, instead_of=instead_of))
        batch = [classed for classed, evidence in zip(batch, merged, strict=True) if evidence is None]
    yield from judge_each(batch, base_of, bases)


def _merge_together(
    tasks: list[Task], base_of: dict[int, GroupBase], others: list[Base], bases: GroupBases
) -> tuple[Evidence | None, ...]:
    """The evidence of each task. None if its merge raises: it is then merged alone, which shows the error."""
    report = paced(bases.report, tasks[0].index)
    counts = [(0, 0)] * len(tasks)

    def add(number: int, done: int, total: int, module: str) -> None:
        counts[number] = done, total
        report(sum(done for done, _ in counts), sum(total for _, total in counts), module)

    pinned = [contextlib.ExitStack() for _ in tasks]
    requests: dict[int, MergeRequest] = {}
    try:
        for number, task in enumerate(tasks):
            on_work = functools.partial(_report_work, bases.report, task.index)
            on_work()
            with contextlib.suppress(Exception):
                load = base_of[task.index]
                request = request_of(task, load, pinned[number], functools.partial(add, number))
                request = with_consumers(request, task, load, bases, pinned[number])
                requests[number] = replace(request, on_work=on_work)
        evidence = adapter_evidence.merge_together(tuple(requests.values()), others)
        merged = dict(zip(requests, evidence, strict=True))
    finally:
        with ThreadPoolExecutor(HASHED_AT_A_TIME) as pool:
            is_released = list(pool.map(_is_released, pinned))
        changed = {number for number, is_same in enumerate(is_released) if not is_same}
    return tuple(None if number in changed else merged.get(number) for number in range(len(tasks)))


def _report_work(report: Listener, task: int) -> None:
    """Tell the parent what this thread works on: if the process dies, it is one of these adapters."""
    is_main = threading.current_thread() is threading.main_thread()
    report(InProgress(task=task, thread=None if is_main else threading.get_ident()))


def _is_released(pinned: contextlib.ExitStack) -> bool:
    """Close an adapter's files. False if they changed during the merge."""
    try:
        pinned.close()
    except Exception:
        return False
    return True
