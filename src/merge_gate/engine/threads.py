"""Work on many tensors at once: one thread per core, each computing by itself.

In: a function and items. Out: results, in the items' order. torch's own threads share every operation and meet at a
barrier after it; on blocks that stay in cache that is thousands of meetings a second, and where another process uses a
core each of them waits for a time slice (measured: 2 s became 150 s). Threads that meet once at the end do not care.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

Item = TypeVar("Item")
Out = TypeVar("Out")

MOST_THREADS = 16
"""Beyond this, reading the weights is limited by memory."""


def threads(quota_file: str = "/sys/fs/cgroup/cpu.max") -> int:
    """Cores that this process may use: its affinity, the container's quota, and OMP_NUM_THREADS where it is set."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [cores, MOST_THREADS]
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted):
        limits.append(int(wanted))
    try:
        quota, period = Path(quota_file).read_text(encoding="ascii").split()
        limits.append(max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # no quota, or "max"
    return min(limits)


def spread(function: Callable[[Item], Out], items: Iterable[Item]) -> Iterator[Out]:
    """Apply `function` to every item, on all cores; results come in order, an exception when its turn comes."""
    todo = list(items)
    count = min(threads(), len(todo))
    if count <= 1:
        yield from map(function, todo)
        return
    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(function, todo)
