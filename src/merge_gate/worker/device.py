"""Finds the device that a run merges on without importing torch, from the system's own files."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

CARDS = ("nvidia*", "nvhost*", "nvmap*", "nvgpu*", "dxg", "kfd")
"""Device files that torch may use as CUDA: of NVIDIA, Tegra, the Windows subsystem for Linux, and AMD."""


OF_DRIVERS = ("connect", "move_pages", "sched_setscheduler", "process_vm_readv", "shmget", "mq_open", "perf_event_open")
"""Calls of GPU drivers that the sandbox refuses (sandbox.py). A process does not learn which one it was."""


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
        return any(path.match(pattern) for path in devices.iterdir() for pattern in CARDS)
    except OSError:
        return True


def why_no_card(environ: Mapping[str, str], devices: Path = Path("/dev")) -> str:
    """What may keep the confined worker from a card, and what to do about it."""
    if (devices / "nvidiactl").exists() and not (devices / "nvidia-uvm").exists():
        return f"{devices}/nvidia-uvm does not exist until CUDA is used once: run `nvidia-modprobe -u -c 0` first"
    pipes = Path(environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))  # noqa: S108 - CUDA's own default
    if (pipes / "control").exists():
        return f"the sandbox keeps CUDA from the MPS server ({pipes}): stop that server, or set MERGE_GATE_SANDBOX=off"
    if has_card(devices) and environ.get("MERGE_GATE_SANDBOX") != "off":
        return (
            "run `nvidia-smi`: if it fails, so does the driver. If it works, torch may be built for the CPU, or the "
            f"driver may need a call that the sandbox refuses ({', '.join(OF_DRIVERS)}): try MERGE_GATE_SANDBOX=off"
        )
    return "use --device cpu, or run where the GPU is visible (driver, container runtime, torch for CUDA)"
