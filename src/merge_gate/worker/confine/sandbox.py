"""The worker's sandbox: what the kernel keeps it from, whatever code comes to run in it.

In: the worker's own directory; later its job. Out: `Sandbox`: what holds, and why the rest does not. Files are read as
before; written are its own directory, /dev/null, and what a GPU's driver needs. Neither torch nor threads may be there
before `confine`: a thread that runs already is not held.
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
from merge_gate.worker.memory import MemoryGroup, base_bytes
from merge_gate.worker.protocol import Job

SWITCH = "MERGE_GATE_SANDBOX"
"""`off` runs the worker without a sandbox, which the report then says."""

CACHES = {
    "HF_MODULES_CACHE": "modules",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",  # made while torch's compiler is imported; the import fails where it cannot
    "TRITON_CACHE_DIR": "triton",
    "CUDA_CACHE_PATH": "cuda",
}
"""Where libraries write; names of directories in the worker's own."""

_DEVICES = ("nvidia*", "nvidia-caps/*", "dxg", "kfd", "dri/*")
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITIES_VERSION, _KEPT_CAPABILITIES = 0x20080522, 1 << 1 | 1 << 2  # to read files whatever their modes
_SPARE_FILE_BYTES = 1 << 30
_SPARE_MEMORY_BYTES = 8 << 30
_WIDEST_CAST = 4  # a byte of the file may be four in memory


def caches(directory: str) -> dict[str, str]:
    """The worker's environment, as far as its directory decides it."""
    return {"TMPDIR": directory, **{name: str(Path(directory, below)) for name, below in CACHES.items()}}


def confine(directory: Path) -> Sandbox:
    """Give up, for good, what merging does not need."""
    if os.environ.get(SWITCH) == "off":
        return Sandbox(missing=(f"all of it: {SWITCH} is off",))
    sandbox = Sandbox()
    _libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _drop_capabilities()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sandbox = _try(sandbox, ("files",), lambda: restrict_writes(_writable(directory)), "Landlock")
    return _try(sandbox, ("network", "processes"), refuse_calls, "seccomp")


def limit(sandbox: Sandbox, job: Job, device: str) -> Sandbox:
    """Bound what one file, and the memory of the process, can grow to."""
    if os.environ.get(SWITCH) == "off":
        return sandbox
    files = (file for group in job.groups for task in group.tasks for one in task.files for file in one.files)
    _lower(resource.RLIMIT_FSIZE, _SPARE_FILE_BYTES + 2 * sum(file.size_bytes for file in files))
    sandbox = replace(sandbox, held=(*sandbox.held, "file size"))
    free_bytes = MemoryGroup().free_bytes()
    if device != "cpu" or free_bytes is None:
        why = "memory: a card's driver maps more addresses than there is memory"
        return replace(sandbox, missing=(*sandbox.missing, why))
    stored = sum(base_bytes(group.directory) or 0 for group in job.groups)
    _lower(resource.RLIMIT_DATA, _SPARE_MEMORY_BYTES + free_bytes + _WIDEST_CAST * stored)
    return replace(sandbox, held=(*sandbox.held, "memory"))


def _try(sandbox: Sandbox, parts: tuple[str, ...], hold: Callable[[], None], what: str) -> Sandbox:
    try:
        hold()
    except OSError as error:
        why = f"{' and '.join(parts)}: {what} is not to be had here ({error.strerror})"
        return replace(sandbox, missing=(*sandbox.missing, why))
    return replace(sandbox, held=(*sandbox.held, *parts))


def _writable(directory: Path) -> Iterable[Path]:
    yield directory
    yield Path(os.devnull)
    devices = [path for pattern in _DEVICES for path in Path("/dev").glob(pattern)]
    if devices:  # CUDA makes files in /dev/shm, and writes the names of its threads
        yield from (path for path in (*devices, Path("/dev/shm"), Path("/proc/self")) if path.exists())  # noqa: S108


def _drop_capabilities() -> None:
    """A worker of root's keeps the right to read any file, and no other."""
    header = struct.pack("=Ii", _CAPABILITIES_VERSION, 0)
    both_halves = ctypes.create_string_buffer(24)
    if _libc().capget(header, both_halves) == 0:
        effective, permitted, *_ = struct.unpack("=6I", both_halves.raw)
        kept = (effective & _KEPT_CAPABILITIES, permitted & _KEPT_CAPABILITIES)
        _libc().capset(header, struct.pack("=6I", *kept, 0, 0, 0, 0))


def _lower(what: int, to_bytes: int) -> None:
    _, hard = resource.getrlimit(what)
    new = to_bytes if hard == resource.RLIM_INFINITY else min(to_bytes, hard)
    resource.setrlimit(what, (new, new))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
