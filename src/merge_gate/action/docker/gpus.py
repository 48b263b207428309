"""Which GPUs to ask for, and how an engine is asked.

In: the inputs `gpus` and `device`, the caller's environment, what the engine says of itself. Out: the GPUs wanted as
a word, and the device request that this engine understands. Pure; knows no SDK.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate.action.docker import canary
from merge_gate.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

_GPU_LIST = re.compile(r"[A-Za-z0-9][A-Za-z0-9:_-]*(,[A-Za-z0-9][A-Za-z0-9:_-]*)*")


def wanted_gpus(gpus: str, device: str, environ: Mapping[str, str], devices: Path = Path("/dev")) -> str:
    """Return the GPUs to ask for: empty for none, `all`, or a list of indices or UUIDs.

    `auto` asks for what this machine has. What the runner's operator allots to the job is a ceiling: `auto` and `all`
    mean all of it, and more than it is refused.
    """
    if gpus not in {"auto", "none", "all"} and not _GPU_LIST.fullmatch(gpus):
        raise UsageError(f"gpus: got {gpus!r}, expected auto, none, all, or a list such as 0,1")
    wants_cuda = device.startswith("cuda")
    if device == "cpu" or gpus == "none":
        if wants_cuda or gpus not in {"auto", "none"}:
            raise UsageError(
                f"gpus: {gpus} and device: {device} contradict each other", hint="leave one of them at auto"
            )
        return ""
    allotted = allotment(environ)
    if gpus == "auto" and not wants_cuda:
        return ",".join(allotted) if allotted is not None else "all" if canary.gpu_devices(devices) else ""
    if allotted is None:
        return "all" if gpus == "auto" else gpus
    asked = [gpu for gpu in gpus.split(",") if gpu not in {"auto", "all"}]
    if not allotted or not set(asked) <= set(allotted):
        raise UsageError(
            f"gpus: {gpus} and device: {device} ask for more than this runner allots to the job: "
            f"{','.join(allotted) or 'no GPU'} ({_named(environ)})",
            hint="ask for `gpus: all`, which is all that is allotted, or for `gpus: none`",
        )
    return ",".join(asked or allotted)


def allotment(environ: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the GPUs that the operator of the runner gives the job, None where nothing limits them.

    NVIDIA_VISIBLE_DEVICES is the words of NVIDIA's runtime, of which `all` and `void` say nothing about a share, and
    CUDA_VISIBLE_DEVICES those of CUDA, where no number at all means no GPU. Where both give a list, both hold.
    """
    runtime = environ.get("NVIDIA_VISIBLE_DEVICES", "")
    cuda = environ.get("CUDA_VISIBLE_DEVICES")
    shares = []
    if runtime not in {"", "all", "void"}:
        shares.append(() if runtime == "none" else _listed(runtime))
    if cuda is not None:
        shares.append(() if cuda.strip() in {"", "-1", "NoDevFiles"} else _listed(cuda))
    known = [share for share in shares if share is not None]
    return tuple(gpu for gpu in known[0] if all(gpu in share for share in known)) if known else None


def _listed(text: str) -> tuple[str, ...] | None:
    """A list of GPUs; None for what is none, which is an operator's own convention and tells nothing."""
    words = text.replace(" ", "")
    return tuple(words.split(",")) if _GPU_LIST.fullmatch(words) else None


def _named(environ: Mapping[str, str]) -> str:
    names = ("NVIDIA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
    return ", ".join(f"{name}={environ[name]}" for name in names if name in environ)


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
