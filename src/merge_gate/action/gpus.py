"""Which GPUs to ask for, and how an engine is asked.

In: the inputs `gpus` and `device`, the caller's environment, what the engine says of itself. Out: the GPUs wanted as
a word, and the device request that this engine understands. Pure; knows no SDK. Keeps to Python 3.9.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate.action import canary
from merge_gate.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

_GPU_LIST = re.compile(r"[A-Za-z0-9][A-Za-z0-9:_-]*(,[A-Za-z0-9][A-Za-z0-9:_-]*)*")


def wanted_gpus(gpus: str, device: str, environ: Mapping[str, str], devices: Path = Path("/dev")) -> str:
    """Return the GPUs to ask for: empty for none, `all`, or a list of indices or UUIDs.

    `auto` asks for what this machine has. NVIDIA_VISIBLE_DEVICES with a list is how a runner's operator shares out
    GPUs among jobs, so it narrows `auto` and `all`; NVIDIA's own values `all` and `void` say nothing about them.
    """
    visible = environ.get("NVIDIA_VISIBLE_DEVICES", "")
    shared_out = visible if visible not in {"", "all", "void", "none"} and _GPU_LIST.fullmatch(visible) else ""
    if gpus not in {"auto", "none", "all"} and not _GPU_LIST.fullmatch(gpus):
        raise UsageError(f"gpus: got {gpus!r}, expected auto, none, all, or a list such as 0,1")
    if device == "cpu" or gpus == "none":
        if device.startswith("cuda") or gpus not in {"auto", "none"}:
            raise UsageError(
                f"gpus: {gpus} and device: {device} contradict each other", hint="leave one of them at auto"
            )
        return ""
    if gpus == "auto":
        asked = device.startswith("cuda") or (visible != "none" and bool(canary.gpu_devices(devices)))
        return shared_out or ("all" if asked else "")
    if gpus == "all" and visible == "none":
        raise UsageError("gpus: all, but NVIDIA_VISIBLE_DEVICES=none: this runner gives the job no GPU")
    return (shared_out or "all") if gpus == "all" else gpus


def device_requests(gpus: str, *, podman: bool, nvidia_runtime: bool, cdi_gpus: bool) -> list[dict[str, Any]]:
    """Return the engine's words for `gpus`.

    podman's Docker-compatible API starts a container without the GPU, and without an error, for anything but CDI.
    Docker takes its own request where NVIDIA's runtime is registered, and CDI where it lists such devices.
    """
    if not gpus:
        return []
    if podman or (cdi_gpus and not nvidia_runtime):
        return [{"Driver": "cdi", "DeviceIDs": [f"nvidia.com/gpu={gpu}" for gpu in gpus.split(",")]}]
    if gpus == "all":
        return [{"Driver": "", "Count": -1, "Capabilities": [["gpu"]]}]
    return [{"Driver": "", "DeviceIDs": gpus.split(","), "Capabilities": [["gpu"]]}]
