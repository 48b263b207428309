"""Run a command in a memory cgroup, and measure all of it: time, memory, and what it reads from the disk.

In: an argument list and a limit. Out: `Limited`. The memory that counts is anonymous and shared memory of all processes
in the cgroup. It and the bytes that each process has read from a disk are sampled every 20 ms. The limit includes pages
of files, which the kernel drops when it needs the room. Needs root, and cgroups of version 1 or 2.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SAMPLE_S = 0.02
ROOT = Path("/sys/fs/cgroup")
IS_V1 = (ROOT / "memory").is_dir()
ENTER = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Limited:
    wall_s: float
    cpu_s: float
    peak_bytes: int
    read_bytes: int
    exit_code: int


@contextlib.contextmanager
def _group(max_bytes: int | None) -> Iterator[Path]:
    group = ROOT / ("memory" if IS_V1 else "") / f"merge-gate-bench-{os.getpid()}"
    group.mkdir()
    try:
        if max_bytes:
            (group / ("memory.limit_in_bytes" if IS_V1 else "memory.max")).write_text(str(max_bytes))
        yield group
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


class _Sampler(threading.Thread):
    """Watches a cgroup until it is stopped."""

    def __init__(self, group: Path) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._read: dict[int, int] = {}
        self._group, self._done = group, threading.Event()

    @property
    def read_bytes(self) -> int:
        return sum(self._read.values())

    def run(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, self._held_bytes())
            for pid in map(int, (self._group / "cgroup.procs").read_text().split()):
                with contextlib.suppress(OSError, ValueError):
                    lines = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
                    self._read[pid] = int(lines["read_bytes"])

    def stop(self) -> None:
        self._done.set()
        self.join()

    def _held_bytes(self) -> int:
        names = ("total_rss", "total_shmem") if IS_V1 else ("anon", "shmem")
        lines = dict(line.split() for line in (self._group / "memory.stat").read_text().splitlines())
        return sum(int(lines[name]) for name in names)


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def run(command: list[str], *, max_bytes: int | None = None, **options) -> Limited:
    """Run the command. `options` go to Popen."""
    with _group(max_bytes) as group:
        started = time.perf_counter()
        process = subprocess.Popen(["sh", "-c", ENTER, str(group), *command], **options)
        sampler = _Sampler(group)
        sampler.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        finally:
            sampler.stop()
        process.returncode = os.waitstatus_to_exitcode(status)
        return Limited(
            wall_s=round(time.perf_counter() - started, 2),
            cpu_s=round(usage.ru_utime + usage.ru_stime, 2),
            peak_bytes=sampler.peak_bytes,
            read_bytes=sampler.read_bytes,
            exit_code=process.returncode,
        )
