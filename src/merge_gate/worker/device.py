"""Finds the device that a run merges on without importing torch, from the system's own files."""

from __future__ import annotations

import contextlib
from pathlib import Path

_CARDS = ("nvidia", "nvhost", "nvmap", "nvgpu", "dxg", "kfd")
"""Prefixes of device files that torch may use as CUDA: of NVIDIA, Tegra, the Windows subsystem for Linux, and AMD."""


def cpu_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model name; empty if the system does not give it."""
    with contextlib.suppress(OSError), info.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return ""


def has_card(devices: Path = Path("/dev")) -> bool:
    """Whether there may be a GPU that torch can use."""
    try:
        return any(path.name.startswith(_CARDS) for path in devices.iterdir())
    except OSError:
        return True
