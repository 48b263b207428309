"""Decides which GPUs to request, and in which form the engine takes the request.

The inputs `gpus` and `device`, the caller's environment, and facts about the engine go in. This module does not use the
SDK.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate._internal.errors import UsageError
from merge_gate._internal.text import foreign
from merge_gate.action.docker.handover import gpu_devices

if TYPE_CHECKING:
    from collections.abc import Mapping

    from merge_gate.action.docker.docker_api import Engine

CDI_KIND = "nvidia.com/gpu="
"""The start of the CDI name of a GPU, such as `nvidia.com/gpu=0`."""
_GPU = rf"({re.escape(CDI_KIND)})?[A-Za-z0-9][A-Za-z0-9:_-]*"
_GPU_LIST = re.compile(rf"{_GPU}(,{_GPU})*")


def requested_gpus(gpus: str, device: str, environ: Mapping[str, str], devices: Path = Path("/dev")) -> str:
    """Return the GPUs to request: empty for none, `all`, or a list of indices, UUIDs, or CDI names.

    `auto` requests the GPUs of this machine. If the runner's operator allots GPUs to the job, `auto` and `all` mean the
    allotted GPUs, and a request for any other GPU is refused.
    """
    if gpus not in {"auto", "none", "all"} and not _GPU_LIST.fullmatch(gpus):
        raise UsageError(f"gpus: got {foreign(gpus)}, expected auto, none, all, or a list such as 0,1")
    refuse_contradiction(gpus, device)
    if device == "cpu" or gpus == "none":
        return ""
    needs_cuda = device.startswith("cuda")
    allotted = allotment(environ)
    if gpus == "auto" and not needs_cuda:
        return ",".join(allotted) if allotted is not None else "all" if gpu_devices(devices) else ""
    if allotted is None:
        return "all" if gpus == "auto" else gpus
    requested = [gpu for gpu in gpus.split(",") if _name(gpu) not in {"auto", "all"}]
    if not allotted or not {_name(gpu) for gpu in requested} <= {_name(gpu) for gpu in allotted}:
        raise UsageError(
            f"gpus: {gpus} and device: {device} request more than this runner allots to the job: "
            f"{','.join(allotted) or 'no GPU'} ({_variables(environ)})",
            hint="use `gpus: all` for all allotted GPUs, or `gpus: none`",
        )
    return ",".join(requested or allotted)


def refuse_contradiction(gpus: str, device: str) -> None:
    """Refuse GPUs for a run on the CPU, and a run on GPUs without any."""
    if (device == "cpu" and gpus not in {"auto", "none"}) or (device.startswith("cuda") and gpus == "none"):
        raise UsageError(f"gpus: {gpus} and device: {device} contradict each other", hint="leave one of them at auto")


def allotment(environ: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the GPUs that the operator of the runner allots to the job; None if there is no limit.

    NVIDIA_VISIBLE_DEVICES is read by NVIDIA's runtime; `all` and `void` set no limit. CUDA_VISIBLE_DEVICES is read by
    CUDA; an empty value means no GPU. If both give a list, only GPUs in both lists are allotted.
    """
    runtime = environ.get("NVIDIA_VISIBLE_DEVICES", "")
    cuda = environ.get("CUDA_VISIBLE_DEVICES")
    shares = []
    if _name(runtime) not in {"", "all", "void"}:
        shares.append(() if runtime == "none" else _listed(runtime))
    if cuda is not None:
        shares.append(() if cuda.strip() in {"", "-1", "NoDevFiles"} else _listed(cuda))
    lists = [share for share in shares if share is not None]
    names = [{_name(gpu) for gpu in share} for share in lists]
    return tuple(gpu for gpu in lists[0] if all(_name(gpu) in share for share in names)) if lists else None


def _name(gpu: str) -> str:
    """The GPU's index, UUID, or `all`, without the kind of a CDI name."""
    return gpu.removeprefix(CDI_KIND)


def _listed(text: str) -> tuple[str, ...] | None:
    """Parse a list of GPUs; None for any other text, which is an operator's own convention."""
    words = text.replace(" ", "")
    return tuple(words.split(",")) if _GPU_LIST.fullmatch(words) else None


def _variables(environ: Mapping[str, str]) -> str:
    names = ("NVIDIA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
    return ", ".join(f"{name}={environ[name]}" for name in names if name in environ)


def device_requests(gpus: str, engine: Engine) -> list[dict[str, Any]]:
    """Return the device request for `gpus` in the form that the engine takes.

    podman's Docker-compatible API ignores any request but CDI without an error. Docker takes its own form of request if
    NVIDIA's runtime is registered, and CDI if it lists CDI devices (from 28.2 on) or if a GPU has its CDI name.
    """
    if not gpus:
        return []
    if engine.podman or (engine.cdi_gpus and not engine.nvidia_runtime) or CDI_KIND in gpus:
        return [{"Driver": "cdi", "DeviceIDs": [CDI_KIND + _name(gpu) for gpu in gpus.split(",")]}]
    if gpus == "all":
        return [{"Driver": "", "Count": -1, "Capabilities": [["gpu"]]}]
    return [{"Driver": "", "DeviceIDs": gpus.split(","), "Capabilities": [["gpu"]]}]
