"""Groups the entries that need a merge by base, so that each base is loaded once.

In: entries. Out: `Group`s for the worker, in the order of the configuration. It imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from merge_gate.judging import all_checks
from merge_gate.records.files import BaseFiles, Entry
from merge_gate.records.terms import BaseKey
from merge_gate.worker.protocol import DEFAULT_LIMIT_S, Group, Task

LIMIT_PER_GIB_S = 180.0


def group_by_base(
    entries: Iterable[tuple[int, Entry]], *, publishes: Mapping[int, str] | None = None
) -> tuple[Group, ...]:
    """Group entries by the key of their base. Each comes with the index of its task.

    `publishes` has the dtype of each entry that is published.
    """
    groups: dict[BaseKey, Group] = {}
    for index, entry in entries:
        base, files = entry.base, entry.base_files
        if base is None or files is None:
            raise AssertionError("an entry without a base has a verdict before it is grouped")
        named = replace(entry.spec.base.key(entry.dtype), model=base.name, revision=base.revision)
        key = replace(named, model=base.directory)  # a directory may be written in several ways
        group = groups.get(key) or Group(base=named, directory=base.directory, files=files, tasks=())
        task = _task(index, entry, limit_s=_default_limit_s(files))
        task = replace(task, publishes=(publishes or {}).get(index))
        groups[key] = replace(group, tasks=(*group.tasks, task))
    return tuple(groups.values())


def _task(index: int, entry: Entry, *, limit_s: float) -> Task:
    spec = entry.spec
    return Task(
        index=index,
        files=entry.members,
        combine=spec.combine,
        measure_options=all_checks.measure_options(spec),
        limit_s=spec.limit_seconds or limit_s,
    )


def _default_limit_s(files: BaseFiles) -> float:
    """A time limit that grows with the base: several times what a merge takes on two slow cores.

    The size is the one that the files had when their headers were read: now, their mount may not answer.
    """
    return DEFAULT_LIMIT_S + LIMIT_PER_GIB_S * files.weight_bytes / 2**30
