"""What the kernel says of memory: whether a process was killed for want of it, and how much there was.

In: the control group's own counters (version 2, or 1). Out: numbers, or None where the system does not tell. Linux
only; elsewhere nothing is known.
"""

from __future__ import annotations

from pathlib import Path

from merge_gate.files.identity import base_identity

_PROC, _ROOT, _MEMINFO = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"), Path("/proc/meminfo")
_UNLIMITED = 1 << 60  # version 1 writes a very large number where there is no limit


class MemoryGroup:
    """The control group of this process, which its children share."""

    def __init__(self, proc: Path = _PROC, root: Path = _ROOT, meminfo: Path = _MEMINFO) -> None:
        self._directory, self._version = _find(proc, root)
        self._meminfo = meminfo

    def kills(self) -> int | None:
        """Processes of the group that were killed for want of memory so far."""
        name = "memory.events" if self._version == 2 else "memory.oom_control"  # noqa: PLR2004
        for line in self._text(name).splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill" and value.isdecimal():
                return int(value)
        return None

    def peak_bytes(self) -> int | None:
        """The most memory that the group has used at once."""
        return self._number("memory.peak" if self._version == 2 else "memory.max_usage_in_bytes")  # noqa: PLR2004

    def limit_bytes(self) -> int | None:
        """What the group may use; None where there is no limit."""
        limit = self._number("memory.max" if self._version == 2 else "memory.limit_in_bytes")  # noqa: PLR2004
        return limit if limit is not None and limit < _UNLIMITED else None

    def free_bytes(self) -> int | None:
        """What a new process may hope for: what the machine has available, and no more than the group may use."""
        limits = [one for one in (_available_bytes(self._meminfo), self.limit_bytes()) if one is not None]
        return min(limits, default=None)

    def _number(self, name: str) -> int | None:
        text = self._text(name).strip()
        return int(text) if text.isdecimal() else None

    def _text(self, name: str) -> str:
        try:
            return (self._directory / name).read_text() if self._directory else ""
        except OSError:
            return ""


def _find(proc: Path, root: Path) -> tuple[Path | None, int]:
    """The group's directory; in a container its own group is the root that it sees."""
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
    return next((one for one in (root / path.lstrip("/"), root) if (one / name).exists()), None)


def _available_bytes(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return int(found) * 1024 if found is not None else None


def too_large(label: str, directory: str, free_bytes: int | None, weights: tuple[str, ...] = ()) -> str | None:
    """A note on a base whose files are larger than the free memory; None if they are not.

    `weights` are the files that are loaded, if they are known: a directory may hold others.
    """
    size_bytes = _loaded_bytes(directory, weights) if weights else base_bytes(directory)
    if size_bytes is None or free_bytes is None or size_bytes <= free_bytes:
        return None
    return (
        f"base {label} has {gibibytes(size_bytes)}, and {gibibytes(free_bytes)} of memory are free here: its adapters "
        "are merged in one pass over its files; in a dtype other than the stored one it may not fit"
    )


def base_bytes(directory: str) -> int | None:
    """What a base's files hold; None where they cannot be looked at, of which the worker says why."""
    try:
        return sum(file.size_bytes for file in base_identity(directory))
    except OSError:
        return None


def _loaded_bytes(directory: str, weights: tuple[str, ...]) -> int | None:
    try:
        return sum(Path(directory, name).stat().st_size for name in weights)
    except OSError:
        return None


def gibibytes(count: int) -> str:
    """A number of bytes as people say it."""
    return f"{count / 2**30:.1f} GiB"
