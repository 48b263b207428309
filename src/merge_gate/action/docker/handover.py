"""Hands the container what its description must not show, and lets it check what the engine gave it.

The launcher writes one line with the secrets (`written`), plants files, and passes expectations in environment
variables. The container's entrypoint reads the line (`read`) and compares (`verify`). A daemon on another host mounts
empty directories, and an engine may ignore a request for GPUs without an error (podman's Docker-compatible API does).
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from merge_gate._internal.errors import LauncherError
from merge_gate._internal.text import counted

if TYPE_CHECKING:
    from collections.abc import Mapping

MARKER = "MERGE_GATE_HANDOVER"
"""Set inside the container if a line will follow."""
FILES = "MERGE_GATE_CANARIES"
GPUS = "MERGE_GATE_GPUS"
GPU_HINT = (
    "install the NVIDIA Container Toolkit on the runner (and its CDI specification for podman), or set `gpus: none` "
    "to run on the CPU"
)

_MAX_BYTES = 65_536
_DEVICES = ("nvidia[0-9]*", "nvidiactl", "nvhost*", "nvgpu*", "dxg")
"""Device files of NVIDIA GPUs: discrete GPUs, Jetson boards, and WSL."""
_GPU_DEVICE = re.compile(r"/nvidia\d+$")


# --- secrets (a token, proxies with passwords) -----------------------------------------------------------------------


def written(variables: Mapping[str, str]) -> bytes:
    """Return the line for `read`. Raises `LauncherError` if it is too long."""
    line = json.dumps(dict(variables)).encode("ascii") + b"\n"
    if len(line) > _MAX_BYTES:
        raise LauncherError(
            f"the token and the proxies for the container have {len(line)} bytes, expected at most {_MAX_BYTES}"
        )
    return line


def read(environ: Mapping[str, str], stream: BinaryIO) -> dict[str, str]:
    """Return the variables; none if `environ` announces none. Raises `LauncherError`."""
    if not environ.get(MARKER):
        return {}
    line = stream.readline(_MAX_BYTES)
    try:
        variables = json.loads(line)
        return {str(name): str(value) for name, value in variables.items()}
    except (ValueError, AttributeError) as error:
        raise LauncherError(
            f"the container did not receive the token: got {counted(len(line), 'byte')} on standard input, expected "
            "one line",
            hint="run again: the launcher was stopped during the start, or the engine lost the container's input",
        ) from error


# --- canaries and GPUs -----------------------------------------------------------------------------------------------


def plant(directory: Path) -> Path:
    """Write a small random file into `directory` and return its path. The caller removes it."""
    path = directory / f"canary-{secrets.token_hex(8)}"
    path.write_text(secrets.token_hex(16), encoding="ascii")
    return path


def expectations(files: Mapping[Path, Path], gpus: str) -> dict[str, str]:
    """Return the variables that `verify` reads: the digest of each file, and the requested GPUs (may be empty).

    `files` maps the path inside the container to the path outside.
    """
    digests = {str(inside): _digest(outside) for inside, outside in files.items()}
    return {FILES: json.dumps(digests), **({GPUS: gpus} if gpus else {})}


def verify(environ: Mapping[str, str], devices: Path = Path("/dev")) -> list[str]:
    """Return the device files of the requested GPUs; an empty list if none were requested.

    Raises `LauncherError` if a canary is missing or changed, or if a requested GPU is not visible.
    """
    expected: dict[str, str] = json.loads(environ.get(FILES, "{}"))
    for name, digest in expected.items():
        _verify_file(Path(name), digest)
    requested = environ.get(GPUS, "")
    visible = gpu_devices(devices) if requested else []
    if requested and not visible:
        raise LauncherError(
            f"no GPU is visible inside the container: got no NVIDIA device in {devices}, expected the requested GPUs "
            f"({requested}); nothing was run on the CPU instead",
            hint=GPU_HINT,
        )
    gpus = [name for name in visible if _GPU_DEVICE.search(name)]
    if gpus and len(gpus) < _min_count(requested):
        raise LauncherError(
            f"some GPUs are missing inside the container: got {', '.join(gpus)}, expected {_min_count(requested)} "
            f"({requested})",
            hint=GPU_HINT,
        )
    return visible


def _min_count(requested: str) -> int:
    """The least number of device files. Slices of one GPU (MIG) have several names and one device file."""
    names = set(requested.split(","))
    return 1 if "all" in names or any("MIG" in name or ":" in name for name in names) else len(names)


def gpu_devices(devices: Path = Path("/dev")) -> list[str]:
    """Return the device files of NVIDIA GPUs in this system or container."""
    return sorted({str(path) for pattern in _DEVICES for path in devices.glob(pattern)})


def _verify_file(path: Path, digest: str) -> None:
    try:
        got = _digest(path)
    except FileNotFoundError:
        problem = "does not exist inside the container"
    except OSError as error:
        problem = f"cannot be read inside the container ({error.strerror})"
    else:
        if got == digest:
            return
        problem = "is another file inside the container"
    raise LauncherError(
        f"the directory {path.parent} was not mounted: {path.name} exists outside, but {problem}",
        hint="the engine mounts directories of its own host, so this happens if the runner or the job is itself a "
        "container. Run the job in merge-gate's image (`container:`) with `runtime: native`, or start the engine on "
        "the machine that has the files. On a host with SELinux, check the labels of the directory",
    )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
