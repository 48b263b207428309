"""Proof, from inside the container, that it was given what was asked for: the real directories and a GPU.

In: files outside the container (`plant`, `expectations`). Out: environment variables that carry what must hold, and
`verify`, which the container's entrypoint calls before the gate. A started container proves neither: a daemon on
another host mounts empty directories, and an engine may ignore a request for GPUs without a word (podman's
Docker-compatible API does) or give fewer. Knows neither engine nor SDK.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate.errors import LauncherError

if TYPE_CHECKING:
    from collections.abc import Mapping

FILES = "MERGE_GATE_CANARIES"
GPUS = "MERGE_GATE_GPUS"

_DEVICES = ("nvidia[0-9]*", "nvidiactl", "nvhost*", "nvgpu*", "dxg")
"""Device files of NVIDIA GPUs: discrete cards, Jetson boards, and WSL."""


_CARD = re.compile(r"/nvidia\d+$")


def plant(directory: Path) -> Path:
    """Write a small random file into `directory` and return its path; the caller removes it."""
    path = directory / f"canary-{secrets.token_hex(8)}"
    path.write_text(secrets.token_hex(16), encoding="ascii")
    return path


def expectations(files: Mapping[Path, Path], gpus: str) -> dict[str, str]:
    """Return the variables that `verify` reads: the digest of each file, and the GPUs asked for (may be empty).

    `files` holds each file's path inside and outside.
    """
    digests = {str(inside): _digest(outside) for inside, outside in files.items()}
    return {FILES: json.dumps(digests), **({GPUS: gpus} if gpus else {})}


def verify(environ: Mapping[str, str], devices: Path = Path("/dev")) -> list[str]:
    """Return the device files of the GPUs that were asked for, an empty list where none were.

    Raises `LauncherError` unless every canary is there unchanged and a GPU that was asked for is visible.
    """
    expected: dict[str, str] = json.loads(environ.get(FILES, "{}"))
    for name, digest in expected.items():
        _verify_file(Path(name), digest)
    asked = environ.get(GPUS, "")
    found = gpu_devices(devices) if asked else []
    hint = (
        "install the NVIDIA Container Toolkit on the runner (and its CDI specification for podman), or set "
        "`gpus: none` to run on the CPU"
    )
    if asked and not found:
        raise LauncherError(
            f"no GPU is visible inside the container: got no NVIDIA device in {devices}, expected those asked for "
            f"({asked}); nothing was run on the CPU in their place",
            hint=hint,
        )
    cards = [name for name in found if _CARD.search(name)]
    if cards and len(cards) < _count(asked):
        raise LauncherError(
            f"some GPUs are missing inside the container: got {', '.join(cards)}, expected {_count(asked)} ({asked})",
            hint=hint,
        )
    return found


def _count(asked: str) -> int:
    """How many cards must be there at least. Slices of one card (MIG) are several names and one device file."""
    names = set(asked.split(","))
    return 1 if "all" in names or any("MIG" in name or ":" in name for name in names) else len(names)


def gpu_devices(devices: Path = Path("/dev")) -> list[str]:
    """Return the device files of NVIDIA GPUs, as the system that runs this sees them."""
    return sorted({str(path) for pattern in _DEVICES for path in devices.glob(pattern)})


def _verify_file(path: Path, digest: str) -> None:
    try:
        got = _digest(path)
    except FileNotFoundError:
        problem = "it is not there inside the container"
    except OSError as error:
        problem = f"it cannot be read inside the container ({error.strerror})"
    else:
        if got == digest:
            return
        problem = "it is another file inside the container"
    raise LauncherError(
        f"the directory {path.parent} was not mounted: {path.name} is outside, but {problem}",
        hint="the engine mounts directories of its own host, so this happens where the runner or the job is itself a "
        "container; run the job in merge-gate's image (`container:`) with `runtime: native`, or start the engine where "
        "the files are. On a host with SELinux, check the labels of the directory",
    )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
