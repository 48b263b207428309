"""A runner's limits, for a process and its children: little memory, and a small disk. Needs root.

In: sizes. Out: context managers, with the command that enters the cgroup, and the directory of the disk.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
IS_V1 = (_ROOT / "memory").is_dir()
_ENTER = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
_EMPTIES_WITHIN_S = 20.0


def can_limit_memory() -> bool:
    """Whether this process may make a cgroup with a memory limit."""
    try:
        with memory_limit(1 << 30):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def memory_limit(max_bytes: int) -> Iterator[tuple[str, ...]]:
    """A cgroup. The words start a command in it. Memory that swaps out counts, too."""
    group = _ROOT / ("memory" if IS_V1 else "") / f"merge-gate-e2e-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if IS_V1 else "memory.max")).write_text(str(max_bytes))
        yield "sh", "-c", _ENTER, str(group)
    finally:
        until = time.monotonic() + _EMPTIES_WITHIN_S
        while (group / "cgroup.procs").read_text() and time.monotonic() < until:
            time.sleep(0.1)
        with contextlib.suppress(OSError):
            group.rmdir()


@contextlib.contextmanager
def small_disk(place: Path, size_bytes: int) -> Iterator[Path]:
    """A file system of this size at `place`."""
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=False)
