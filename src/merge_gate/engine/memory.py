"""What the kernel says of memory: whether a process was killed for want of it, and how much there was.

In: the control group's own counters (version 2, or 1). Out: numbers, or None where the system does not tell. Linux
only; elsewhere nothing is known.
"""

from __future__ import annotations

from pathlib import Path

_PROC, _ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # version 1 writes a very large number where there is no limit


class MemoryGroup:
    """The control group of this process, which its children share."""

    def __init__(self, proc: Path = _PROC, root: Path = _ROOT) -> None:
        self._directory, self._version = _find(proc, root)

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


def gibibytes(count: int) -> str:
    """A number of bytes as people say it."""
    return f"{count / 2**30:.1f} GiB"
