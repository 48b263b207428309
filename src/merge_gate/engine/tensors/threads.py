"""Work on many tensors at once: one thread per core, and each thread computes alone, in buffers of its own.

In: a function and items. Out: results, in the order of the items.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

# torch's own threads share every operation and meet at a barrier after it. On blocks that stay in cache that is
# thousands of barriers a second. If another process uses a core, each barrier waits for a time slice: 2 s became 150 s.
# Threads that meet once, at the end, do not have this problem.

Item = TypeVar("Item")
Out = TypeVar("Out")

MOST_THREADS = 16
"""Beyond this, reading the weights is limited by memory."""

AHEAD = 16
"""Items per thread that are in progress before the first result. A slow item then blocks no thread."""


def threads(quota_file: str = "/sys/fs/cgroup/cpu.max", cores: int | None = None) -> int:
    """Cores that this process may use: the least of its affinity, the container's quota, and OMP_NUM_THREADS."""
    if cores is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = [cores, MOST_THREADS]
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted):
        counts.append(int(wanted))
    try:
        quota, period = Path(quota_file).read_text(encoding="ascii").split()
        counts.append(max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # no quota, or "max"
    return min(counts)


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


BLOCK_ELEMENTS = 1 << 17
"""Elements of a block: 512 KiB of float32 product and 256 KiB each of delta and merged weight, in a core's own L2."""

BLOCK_ROWS = 64
"""Rows of a block come in multiples of this, so that every block of a factor starts on a cache line."""


class Buffers:
    """Memory that lives from block to block and from weight to weight. Each thread needs its own.

    It grows to the largest block it met, about 2.5 MiB for a weight in bfloat16.
    """

    def __init__(self, *, block_elements: int = BLOCK_ELEMENTS) -> None:
        self.block_elements = block_elements
        self._buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}
        self._last: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def take(self, name: str, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized tensor of `like`'s shape and device, valid until the next call with this name."""
        return self.of_shape(name, like.shape, dtype, like.device)

    def of_shape(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        key, last = (name, dtype, device), self._last.get((name, dtype, device))
        if last is not None and last.shape == shape:
            return last
        buffer, numel = self._buffers.get(key), math.prod(shape)
        if buffer is None or buffer.numel() < numel:
            buffer = self._buffers[key] = torch.empty(numel, dtype=dtype, device=device)
        self._last[key] = buffer[:numel].view(shape)
        return self._last[key]

    def blocks(self, rows: int, columns: int, device: torch.device) -> tuple[slice, ...]:
        """Slices of about `block_elements`; the last one takes what would be a short block. One slice off the CPU."""
        step = max(self.block_elements // columns // BLOCK_ROWS, 1) * BLOCK_ROWS
        count = max(rows // step, 1) if device.type == "cpu" else 1
        return tuple(slice(i * step, rows if i == count - 1 else (i + 1) * step) for i in range(count))
