"""What is to be merged → one group per base, so that each base is loaded once.

In: the entries of the report to be. Out: `Group`s for the worker, in the order of the config. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from merge_gate.engine.protocol import Group, Task
from merge_gate.judging import checks
from merge_gate.records import Entry, Snapshot


def group_by_base(entries: Iterable[tuple[int, Entry]], *, exhaustive: bool) -> tuple[Group, ...]:
    """Group entries, each with the index of its task, by base, revision, dtype and quantisation."""
    groups: dict[tuple[object, ...], Group] = {}
    for index, entry in entries:
        base, quantization = entry.prepared.base, entry.prepared.spec.base.quantization
        if base is None:
            raise AssertionError("an entry without a base is settled before it is grouped")
        key = (base.directory, base.revision, entry.dtype, quantization)
        group = groups.get(key) or _group(base, entry)
        groups[key] = replace(group, tasks=(*group.tasks, _task(index, entry, exhaustive=exhaustive)))
    return tuple(groups.values())


def _group(base: Snapshot, entry: Entry) -> Group:
    return Group(
        label=base.name,
        directory=base.directory,
        revision=base.revision,
        dtype=entry.dtype,
        quantization=entry.prepared.spec.base.quantization,
        tasks=(),
    )


def _task(index: int, entry: Entry, *, exhaustive: bool) -> Task:
    spec = entry.prepared.spec
    thresholds = checks.thresholds(spec)
    return Task(
        index=index,
        files=entry.prepared.members,
        combine=spec.combine,
        thresholds=replace(thresholds, headroom=0.0) if exhaustive else thresholds,
    )
