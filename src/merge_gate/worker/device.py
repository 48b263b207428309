"""The device that a run merges on, as far as it is known without torch.

In: the system's own files. Out: names, as the worker will say them. Imports no torch.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

_CARDS = ("nvidia", "nvhost", "nvmap", "nvgpu", "dxg", "kfd")
"""How the device files of whatever torch calls CUDA begin: NVIDIA's, Tegra's, those of Windows' subsystem, AMD's."""


def cpu_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's own name; empty where the system does not say it."""
    with contextlib.suppress(OSError), info.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return ""


def has_card(devices: Path = Path("/dev")) -> bool:
    """Whether there may be a card that torch could use."""
    try:
        return any(path.name.startswith(_CARDS) for path in devices.iterdir())
    except OSError:
        return True
