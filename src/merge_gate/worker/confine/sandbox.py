"""Lets the kernel restrict the worker, whatever code runs in it: writes, network, processes, file size, and memory.

`Sandbox` lists the restrictions in force, and why others are missing. Files can still be read. The worker can write to
its own directory, /dev/null, and what a GPU's driver needs. Call `confine` before torch is imported and before any
thread starts: a running thread is not restricted.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from merge_gate.records.report import Sandbox
from merge_gate.worker.confine.landlock import restrict_writes
from merge_gate.worker.confine.system_calls import refuse_calls
from merge_gate.worker.memory import MemoryGroup
from merge_gate.worker.protocol import Job

SWITCH = "MERGE_GATE_SANDBOX"
"""`off` runs the worker without a sandbox, and the report says so."""

CACHES = {
    "HF_MODULES_CACHE": "modules",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",  # the import of torch's compiler fails if it cannot make this directory
    "TRITON_CACHE_DIR": "triton",
    "CUDA_CACHE_PATH": "cuda",
}
"""Variables for directories that libraries write to, each with its name in the worker's own directory."""

_DEVICES = ("nvidia*", "nvidia-caps/*", "dxg", "kfd", "dri/*")
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITIES_VERSION, _READ_CAPABILITIES = 0x20080522, 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
_SPARE_FILE_BYTES = 1 << 30
_SPARE_MEMORY_BYTES = 8 << 30
_MAX_CAST_FACTOR = 4  # one byte of a file may become four in memory
_MOST_LIMIT_BYTES = 1 << 62  # the kernel's numbers are signed; a sparse file can have any size


def caches(directory: str) -> dict[str, str]:
    """The environment variables that depend on the worker's directory."""
    return {"TMPDIR": directory, **{name: str(Path(directory, below)) for name, below in CACHES.items()}}


def confine(directory: Path) -> Sandbox:
    """Give up, permanently, everything that merging does not need."""
    if os.environ.get(SWITCH) == "off":
        return Sandbox(missing=(f"everything: {SWITCH} is off",))
    sandbox = Sandbox()
    _libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _drop_capabilities()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sandbox = _try(sandbox, ("files",), lambda: restrict_writes(_writable(directory)), "Landlock")
    return _try(sandbox, ("network", "processes"), refuse_calls, "seccomp")


def limit(sandbox: Sandbox, job: Job, device: str) -> Sandbox:
    """Limit the size of a written file, and the memory of the process."""
    if os.environ.get(SWITCH) == "off":
        return sandbox
    files = (file for group in job.groups for task in group.tasks for member in task.files for file in member.files)
    _lower(resource.RLIMIT_FSIZE, _SPARE_FILE_BYTES + 2 * sum(file.size_bytes for file in files))
    sandbox = replace(sandbox, held=(*sandbox.held, "file size"))
    free_bytes = MemoryGroup().free_bytes()
    if device != "cpu" or free_bytes is None:
        why = "memory: a GPU's driver maps more addresses than there is memory"
        return replace(sandbox, missing=(*sandbox.missing, why))
    stored = sum(group.files.weight_bytes for group in job.groups)
    _lower(resource.RLIMIT_DATA, _SPARE_MEMORY_BYTES + free_bytes + _MAX_CAST_FACTOR * stored)
    return replace(sandbox, held=(*sandbox.held, "memory"))


def _try(sandbox: Sandbox, parts: tuple[str, ...], restrict: Callable[[], None], mechanism: str) -> Sandbox:
    try:
        restrict()
    except OSError as error:
        why = f"{' and '.join(parts)}: {mechanism} is not available here ({error.strerror})"
        return replace(sandbox, missing=(*sandbox.missing, why))
    return replace(sandbox, held=(*sandbox.held, *parts))


def _writable(directory: Path) -> Iterable[Path]:
    yield directory
    yield Path(os.devnull)
    devices = [path for pattern in _DEVICES for path in Path("/dev").glob(pattern)]
    if devices:  # CUDA creates files in /dev/shm, and writes thread names to /proc/self
        yield from (path for path in (*devices, Path("/dev/shm"), Path("/proc/self")) if path.exists())  # noqa: S108


def _drop_capabilities() -> None:
    """Drop root's capabilities, except the right to read any file."""
    header = struct.pack("=Ii", _CAPABILITIES_VERSION, 0)
    both_halves = ctypes.create_string_buffer(24)
    if _libc().capget(header, both_halves) == 0:
        effective, permitted, *_ = struct.unpack("=6I", both_halves.raw)
        reduced = (effective & _READ_CAPABILITIES, permitted & _READ_CAPABILITIES)
        _libc().capset(header, struct.pack("=6I", *reduced, 0, 0, 0, 0))


def _lower(resource_id: int, to_bytes: int) -> None:
    _, hard = resource.getrlimit(resource_id)
    new = min(to_bytes, _MOST_LIMIT_BYTES if hard == resource.RLIM_INFINITY else hard)
    resource.setrlimit(resource_id, (new, new))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
