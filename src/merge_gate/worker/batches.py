"""Divides the adapters on a base into passes over its files, by the free memory and the limit on open files.

In: tasks. Out: those of each pass. Runs in the worker, and for a plan in the parent; it imports no torch.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from merge_gate.worker.memory import MemoryGroup, factor_bytes
from merge_gate.worker.protocol import ALONE

if TYPE_CHECKING:
    from merge_gate.worker.merging.group_bases import ClassedTask

ADAPTERS_SHARE = 3
"""Adapters that are merged together may take a third of the free memory."""

FILES_SHARE = 2
"""The files of models may be half of those that the process may have open. The others are of bases and adapters."""


def most_model_files() -> int:
    """How many files of models the process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] // FILES_SHARE


def batches(tasks: Sequence[ClassedTask]) -> Iterator[list[ClassedTask]]:
    """Adapters that are merged together: as many of a turn as memory and open files allow."""
    room = (MemoryGroup().free_bytes() or 0) // ADAPTERS_SHARE
    batch: list[ClassedTask] = []
    held = files = 0
    for classed in sorted(tasks, key=lambda classed: classed[0].turn):
        size_bytes, of_model = factor_bytes(classed[0]), classed[0].model_files
        is_apart = classed[0].turn == ALONE or (batch and classed[0].turn != batch[-1][0].turn)
        if batch and (is_apart or held + size_bytes > room or files + of_model > most_model_files()):
            yield batch
            batch, held, files = [], 0, 0
        batch.append(classed)
        held, files = held + size_bytes, files + of_model
    if batch:
        yield batch
