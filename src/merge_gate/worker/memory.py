"""Reads memory counters of the kernel: whether a process was killed for lack of memory, and how much there is.

Has the settings of glibc's allocator for the worker: freed memory is reused for the next tensor.

The counters are those of the process's cgroup (version 2 or 1). Without them, and outside of Linux, the result is None.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

from merge_gate._internal.text import gibibytes
from merge_gate.worker.protocol import Task

REUSE = {"MALLOC_MMAP_MAX_": "0", "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": str(5 << 26)}
"""Environment variables for glibc: pieces of every size come from one heap, which keeps at most 320 MiB of free memory
at its end. Another libc ignores them. By default the kernel gets each large piece back, and clears it for the next
tensor: half the cost of a cross-check, in which PEFT merges with six or seven whole tensors in a row."""

_PROC, _ROOT, _MEMINFO = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"), Path("/proc/meminfo")
_UNLIMITED = 1 << 60  # version 1 writes a very large number if there is no limit


class MemoryGroup:
    """The cgroup of this process, which its children share."""

    def __init__(self, proc: Path = _PROC, root: Path = _ROOT, meminfo: Path = _MEMINFO) -> None:
        self._directory, self._version = _find(proc, root)
        self._meminfo = meminfo

    def kills(self) -> int | None:
        """How many processes of this cgroup the OOM killer has ended."""
        name = "memory.events" if self._version == 2 else "memory.oom_control"  # noqa: PLR2004
        for line in self._text(name).splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill" and value.isdecimal():
                return int(value)
        return None

    def peak_bytes(self) -> int | None:
        """The highest memory use of the group so far."""
        return self._number("memory.peak" if self._version == 2 else "memory.max_usage_in_bytes")  # noqa: PLR2004

    def max_bytes(self) -> int | None:
        """The memory limit of the group; None if it has no limit."""
        allowed = self._number("memory.max" if self._version == 2 else "memory.limit_in_bytes")  # noqa: PLR2004
        return allowed if allowed is not None and allowed < _UNLIMITED else None

    def free_bytes(self) -> int | None:
        """The memory for a new process: what the machine has available, at most the limit of the group."""
        amounts = (_available_bytes(self._meminfo), self.max_bytes())
        return min((allowed for allowed in amounts if allowed is not None), default=None)

    def left_bytes(self) -> int | None:
        """The memory that is left now: what the machine has available, and what the group has not taken of its limit.

        Pages of files do not count as taken: the kernel drops them.
        """
        allowed, taken = self.max_bytes(), self._taken_bytes()
        left = allowed - taken if allowed is not None and taken is not None else allowed
        known = [size_bytes for size_bytes in (_available_bytes(self._meminfo), left) if size_bytes is not None]
        return max(0, min(known)) if known else None

    def _taken_bytes(self) -> int | None:
        """Anonymous and shared memory of the group."""
        names = ("anon", "shmem") if self._version == 2 else ("total_rss", "total_shmem")  # noqa: PLR2004
        counts = dict(line.split(" ", 1) for line in self._text("memory.stat").splitlines() if " " in line)
        values = [int(counts[name]) for name in names if counts.get(name, "").isdecimal()]
        return sum(values) if values else None

    def _number(self, name: str) -> int | None:
        text = self._text(name).strip()
        return int(text) if text.isdecimal() else None

    def _text(self, name: str) -> str:
        try:
            return (self._directory / name).read_text() if self._directory else ""
        except OSError:
            return ""


def _find(proc: Path, root: Path) -> tuple[Path | None, int]:
    """The directory and version of this process's cgroup. A container sees its own cgroup as the root."""
    try:
        lines = [line.split(":", 2) for line in proc.read_text().splitlines()]
    except OSError:
        return None, 2
    for _, controllers, path in lines:
        if "memory" in controllers.split(","):
            return _existing(root / "memory", path, "memory.usage_in_bytes"), 1
    for _, controllers, path in lines:
        if not controllers:
            return _existing(root, path, "memory.events"), 2
    return None, 2


def _existing(root: Path, path: str, name: str) -> Path | None:
    return next((place for place in (root / path.lstrip("/"), root) if (place / name).exists()), None)


def _available_bytes(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    kibibytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return int(kibibytes) * 1024 if kibibytes is not None else None


def too_large(label: str, size_bytes: int, free_bytes: int | None) -> str | None:
    """A note on a base whose weight files are larger than the free memory; None if they are not."""
    if free_bytes is None or size_bytes <= free_bytes:
        return None
    return (
        f"base {label} has {gibibytes(size_bytes)}, and only {gibibytes(free_bytes)} of memory are free: its adapters "
        "are merged in one pass over its files; in another dtype than the stored one, they may not fit"
    )


_LOADED_BYTES, _MAPPED_BYTES = 4, 1
"""What PEFT's float32 factors take of memory, for each value. Those that the file has in float32 are mapped from it."""


def factor_bytes(task: Task, *, in_pass: bool = True) -> int:
    """What an adapter takes of memory once PEFT has loaded it. `in_pass`: float32 factors are mapped from its file."""
    tensors = [part for file in task.files for part in file.tensors]
    mapped_bytes = _MAPPED_BYTES if in_pass else _LOADED_BYTES
    return sum((mapped_bytes if part.dtype == "F32" else _LOADED_BYTES) * math.prod(part.shape) for part in tensors)


def give_back() -> None:
    """Return unused pages to the kernel. To be called after something large was released."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
