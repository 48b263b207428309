"""Work on many tensors at once: one thread per core, and each thread computes alone.

In: a function and items. Out: results, in the order of the items.
"""

# torch's own threads share every operation and meet at a barrier after it. On blocks that stay in cache that is
# thousands of barriers a second. If another process uses a core, each barrier waits for a time slice: 2 s became 150 s.
# Threads that meet once, at the end, do not have this problem.

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

Item = TypeVar("Item")
Out = TypeVar("Out")

MOST_THREADS = 16
"""Beyond this, reading the weights is limited by memory."""

AHEAD = 16
"""Items per thread that are in progress before the first result. A slow item then blocks no thread."""


def threads(quota_file: str = "/sys/fs/cgroup/cpu.max") -> int:
    """Cores that this process may use: the least of its affinity, the container's quota, and OMP_NUM_THREADS."""
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
    """Apply `function` to every item, on all cores. Results come in order, and an exception in its place.

    Items are taken a few at a time, as results are used, so a later item may depend on an earlier result.
    """
    todo, count = iter(items), threads()
    first = list(itertools.islice(todo, 2))
    if count <= 1 or len(first) <= 1:
        yield from map(function, itertools.chain(first, todo))
        return
    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        begun = deque(pool.submit(function, item) for item in (*first, *itertools.islice(todo, AHEAD * count - 2)))
        while begun:
            yield begun.popleft().result()
            begun.extend(pool.submit(function, item) for item in itertools.islice(todo, 1))
