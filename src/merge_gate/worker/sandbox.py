"""Lets the kernel restrict the worker, whatever code runs in it: writes, network, processes, file size, and memory.

`Sandbox` lists the restrictions in force, and why others are missing. Files can still be read. The worker can write to
its own directory, /dev/null, files that the parent opened for it, and what a GPU's driver needs. Call `confine` before
torch is imported and before any thread starts: a running thread is not restricted.

1. Landlock restricts writes, and terminals.    https://docs.kernel.org/userspace-api/landlock.html
2. A seccomp filter refuses system calls.       https://docs.kernel.org/userspace-api/seccomp_filter.html
   Network: only Unix sockets, without connecting them, and no io_uring (which bypasses filters).
   Processes: only threads. No new program. No tracing, reading, limiting, or signaling of another process, and no
   memory, queue, or key that processes share. The process ends with its parent, and cannot change that.
   Terminals: no input for the caller's shell. The process has a session of its own (process.py).
   Files: calls that change modes, owners, times, and attributes, which Landlock does not cover, do nothing and report
   success. Libraries copy files with their modes, and would fail otherwise.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import re
import resource
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from merge_gate.records.report import Sandbox
from merge_gate.worker.device import CARDS
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

DEVICES = (*CARDS, "dri/*")
_PR_SET_NO_NEW_PRIVS = 38
CAPABILITIES_VERSION, _READ_CAPABILITIES = 0x20080522, 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
_SPARE_FILE_BYTES = 1 << 30
_SPARE_MEMORY_BYTES = 8 << 30
_MAX_CAST_FACTOR = 4  # one byte of a file may become four in memory
_MOST_DATA_BYTES = 1 << 62  # the kernel's numbers are signed; a sparse file can have any size


def caches(directory: str) -> dict[str, str]:
    """The environment variables that depend on the worker's directory."""
    return {"TMPDIR": directory, **{name: str(Path(directory, below)) for name, below in CACHES.items()}}


def confine(directory: Path, devices: Iterable[str] = DEVICES) -> Sandbox:
    """Give up, permanently, everything that merging does not need."""
    if os.environ.get(SWITCH) == "off":
        return Sandbox(missing=(f"everything: {SWITCH} is off",))
    sandbox = Sandbox()
    _libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _drop_capabilities()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sandbox = _try(sandbox, ("files",), lambda: restrict_writes(_writable(directory, devices)), "Landlock")
    sandbox = _try(sandbox, ("network", "processes"), refuse_calls, "seccomp")
    if "files" in sandbox.held and (why := why_terminals_are_read()):
        sandbox = replace(sandbox, missing=(*sandbox.missing, f"terminals: what is typed can be read ({why})"))
    return sandbox


def limit(sandbox: Sandbox, job: Job, device: str) -> Sandbox:
    """Limit the size of a written file, and the memory of the process. A model to publish may need a larger file."""
    if os.environ.get(SWITCH) == "off":
        return sandbox
    tasks = [task for group in job.groups for task in group.tasks]
    own_bytes = sum(file.size_bytes for task in tasks for member in task.files for file in member.files)
    of_models = (consumer.most_bytes for task in tasks for consumer in task.consumers)
    _lower(resource.RLIMIT_FSIZE, max(_SPARE_FILE_BYTES + 2 * own_bytes, *of_models, 0))
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


def _writable(directory: Path, patterns: Iterable[str]) -> Iterable[Path]:
    yield directory
    yield Path(os.devnull)
    devices = [path for pattern in patterns for path in Path("/dev").glob(pattern)]
    if devices:  # CUDA creates files in /dev/shm, and writes thread names to /proc/self
        yield from (path for path in (*devices, Path("/dev/shm"), Path("/proc/self")) if path.exists())  # noqa: S108


def _drop_capabilities() -> None:
    """Drop root's capabilities, except the right to read any file."""
    header = struct.pack("=Ii", CAPABILITIES_VERSION, 0)
    both_halves = ctypes.create_string_buffer(24)
    if _libc().capget(header, both_halves) == 0:
        effective, permitted, *_ = struct.unpack("=6I", both_halves.raw)
        reduced = (effective & _READ_CAPABILITIES, permitted & _READ_CAPABILITIES)
        _libc().capset(header, struct.pack("=6I", *reduced, 0, 0, 0, 0))


def _lower(resource_id: int, to_bytes: int) -> None:
    _, hard = resource.getrlimit(resource_id)
    new = min(to_bytes, _MOST_DATA_BYTES if hard == resource.RLIM_INFINITY else hard)
    resource.setrlimit(resource_id, (new, new))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))


# --- 1. Landlock -----------------------------------------------------------------------------------------------------

_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446  # the same numbers on every architecture
_VERSION, _PATH_BENEATH = 1, 1

_WRITE_FILE, _READ_FILE, _TRUNCATE, _IOCTL_DEVICE = 1 << 1, 1 << 2, 1 << 14, 1 << 15
_MAKE_AND_REMOVE = sum(1 << bit for bit in range(4, 13))
_REFER = 1 << 13
_TCP = 1 << 0 | 1 << 1  # bind, connect
_OUTSIDE = 1 << 0 | 1 << 1  # abstract sockets of others, signals to others
_SINCE = {"refer": 2, "truncate": 3, "tcp": 4, "ioctl": 5, "scopes": 6}
"""The version of Landlock that introduced each restriction."""


def restrict_writes(allowed: Iterable[Path]) -> None:
    """Allow writing, creating, and removing only in `allowed` (files and directories, with their contents).

    Raises:
        OSError: this kernel has no Landlock, or Landlock is disabled.
    """
    version = _call(_CREATE, None, ctypes.c_size_t(0), _VERSION)
    writes = _WRITE_FILE | _MAKE_AND_REMOVE
    writes |= _REFER if version >= _SINCE["refer"] else 0
    writes |= _TRUNCATE if version >= _SINCE["truncate"] else 0
    writes |= _IOCTL_DEVICE if version >= _SINCE["ioctl"] else 0
    reads = 0 if why_terminals_are_read() else _READ_FILE
    tcp = _TCP if version >= _SINCE["tcp"] else 0
    scopes = _OUTSIDE if version >= _SINCE["scopes"] else 0
    restrictions = struct.pack("=QQQ", writes | reads, tcp, scopes)
    rules = _call(_CREATE, restrictions, ctypes.c_size_t(len(restrictions)), 0)
    try:
        for path in allowed:
            _allow(rules, path, writes | reads)
        for path in _readable() if reads else ():
            with contextlib.suppress(OSError):  # it is gone, or may not be opened: then it cannot be read either
                _allow(rules, path, reads)
        _call(_RESTRICT, rules, 0)
    finally:
        os.close(rules)


_NOT_READ = frozenset({"pts", "input", "char", "block", "vfio", "vhost", "bus", "snd", "usb"})
_PLAIN_DEVICES = frozenset({"null", "zero", "full", "random", "urandom"})
_MOUNTS = Path("/proc/self/mountinfo")


def _readable() -> Iterator[Path]:
    """Everything but the devices that merging does not need: terminals are among these."""
    yield from (path for path in Path("/").iterdir() if path.name != "dev" and not path.is_symlink())
    for path in Path("/dev").iterdir():
        is_plain = path.name in _PLAIN_DEVICES or any(path.match(f"/dev/{pattern}") for pattern in CARDS)
        if is_plain or (path.name not in _NOT_READ and not path.is_symlink() and path.is_dir()):  # such as /dev/shm
            yield path


def why_terminals_are_read(mounts: Path = _MOUNTS) -> str:
    """Why reading is not restricted; empty if it is. A mount in the root that does not answer would hang the start."""
    try:
        places = [line.split() for line in mounts.read_text(errors="replace").splitlines()]
    except OSError as error:
        return f"{mounts}: {error.strerror}"
    remote = (
        part[4] for part in places if part[4].count("/") == 1 and part[4] not in _LOCAL_MOUNTS and _is_remote(part)
    )
    place = next(remote, None)
    return f"{place} is a network mount" if place is not None else ""


_LOCAL_MOUNTS = frozenset({"/", "/dev", "/proc", "/sys", "/run", "/tmp", "/boot"})  # noqa: S108 - they have no remote files
_REMOTE = re.compile(r"autofs|fuse(\..*)?|nfs4?|cifs|smb3|smbfs|9p|ceph|lustre|afs|gfs2|ocfs2|beegfs|gpfs|glusterfs")


def _is_remote(part: list[str]) -> bool:
    kind = part[part.index("-") + 1] if "-" in part else ""
    return _REMOTE.fullmatch(kind) is not None


def _allow(rules: int, path: Path, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEVICE
        _call(_ADD_RULE, rules, _PATH_BENEATH, struct.pack("=Qi", rights, descriptor), 0)
    finally:
        os.close(descriptor)


def _call(number: int, *arguments: object) -> int:
    result: int = _libc().syscall(number, *arguments)
    if result < 0:
        raise _error()
    return result


# --- 2. seccomp ------------------------------------------------------------------------------------------------------

_PR_SET_SECCOMP, MODE_FILTER = 22, 2
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, (16, 24)  # the lower halves of the first two
_X32 = 0x40000000  # a second table of calls on x86-64

_AF_UNIX, _CLONE_THREAD = 1, 0x10000

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""The kernel's number of each architecture in filters, and its column in the tables below."""

# name: numbers of the call by architecture; 0 if the architecture has no such call
_REFUSED = {
    "connect": (42, 203),
    "io_uring_setup": (425, 425),
    "fork": (57, 0),
    "vfork": (58, 0),
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "unshare": (272, 97),
    "setns": (308, 268),
    "truncate": (76, 45),
    # Of other processes: their scheduling, memory, and what they share.
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "shmget": (29, 194),
    "shmctl": (31, 195),
    "shmat": (30, 196),
    "semget": (64, 190),
    "semctl": (66, 191),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgctl": (71, 187),
    "msgrcv": (70, 188),
    "msgsnd": (69, 189),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # Parts of the kernel that merging does not need.
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
}
_UNKNOWN = {"clone3": (435, 435)}  # a filter cannot read its flags, which are in memory; libraries fall back to clone
_WITHOUT_EFFECT = {
    "chmod": (90, 0),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, 0),
    "fchown": (93, 55),
    "lchown": (94, 0),
    "fchownat": (260, 54),
    "utime": (132, 0),
    "utimes": (235, 0),
    "futimesat": (261, 0),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "removexattrat": (466, 466),
}
_OWN_ONLY = {"kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261)}
"""Calls that take a process. They are allowed for this one; 0 is this one for prlimit64, and for kill its group."""

_SOCKET, _CLONE = (41, 198), (56, 220)

_PDEATHSIG = 1
_TERMINALS = (0x5412, 0x541C, 0x540E, 0x5410)  # TIOCSTI, TIOCLINUX, TIOCSCTTY, TIOCSPGRP
_OWNERS = (0x8901, 0x8902)  # FIOSETOWN, SIOCSPGRP: signals to another process
_BY_ARGUMENT = {
    "prctl": ((157, 167), 0, (_PDEATHSIG,)),
    "ioctl": ((16, 29), 1, (*_TERMINALS, *_OWNERS)),
    "fcntl": ((72, 25), 1, (8, 15)),  # F_SETOWN, F_SETOWN_EX
}
"""Calls that are refused with these values of an argument."""


def refuse_calls() -> None:
    """Refuse the calls above from now on. Requires `no_new_privs`.

    Raises:
        OSError: the kernel has no such filter, or this architecture is unknown.
    """
    if platform.machine() not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"the system calls of {platform.machine()} are not listed")
    program = b"".join(_program(*_ARCHITECTURES[platform.machine()]))
    buffer = ctypes.create_string_buffer(program, len(program))
    filter_ = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    if _libc().prctl(_PR_SET_SECCOMP, MODE_FILTER, filter_, 0, 0):
        raise _error()


def _program(architecture: int, column: int) -> Iterator[bytes]:
    refused = _ERRNO | errno.EPERM
    yield _step(_LOAD, _ARCHITECTURE_AT)
    yield from _unless(_JUMP_EQUAL, architecture, refused)
    yield _step(_LOAD, _NUMBER_AT)
    yield from _where(_JUMP_GREATER_EQUAL, _X32, refused)
    for table, answer in ((_REFUSED, refused), (_UNKNOWN, _ERRNO | errno.ENOSYS), (_WITHOUT_EFFECT, _ERRNO)):
        for numbers in table.values():
            if numbers[column]:
                yield from _where(_JUMP_EQUAL, numbers[column], answer)
    yield from _only_with(_SOCKET[column], _JUMP_EQUAL, _AF_UNIX, refused)
    yield from _only_with(_CLONE[column], _JUMP_ANY_BIT, _CLONE_THREAD, refused)
    for name, numbers in _OWN_ONLY.items():
        own = (0, os.getpid()) if name == "prlimit64" else (os.getpid(),)
        yield from _only_of(numbers[column], own, refused)
    for numbers, argument, values in _BY_ARGUMENT.values():
        yield from _never_with(numbers[column], argument, values, refused)
    yield _step(_RETURN, _ALLOW)


def _where(test: int, value: int, answer: int) -> Iterator[bytes]:
    yield _step(test, value, 0, 1)
    yield _step(_RETURN, answer)


def _unless(test: int, value: int, answer: int) -> Iterator[bytes]:
    yield _step(test, value, 1, 0)
    yield _step(_RETURN, answer)


def _only_with(number: int, test: int, value: int, answer: int) -> Iterator[bytes]:
    """Allow the call only if its first argument passes the test."""
    yield _step(_JUMP_EQUAL, number, 0, 4)
    yield _step(_LOAD, _ARGUMENTS_AT[0])
    yield from _unless(test, value, answer)
    yield _step(_RETURN, _ALLOW)


def _only_of(number: int, processes: Sequence[int], answer: int) -> Iterator[bytes]:
    """Allow the call only if its first argument is one of these processes."""
    yield _step(_JUMP_EQUAL, number, 0, 2 * len(processes) + 2)
    yield _step(_LOAD, _ARGUMENTS_AT[0])
    for process in processes:
        yield from _where(_JUMP_EQUAL, process, _ALLOW)
    yield _step(_RETURN, answer)


def _never_with(number: int, argument: int, values: Sequence[int], answer: int) -> Iterator[bytes]:
    """Refuse the call if an argument has one of these values."""
    yield _step(_JUMP_EQUAL, number, 0, 2 * len(values) + 2)
    yield _step(_LOAD, _ARGUMENTS_AT[argument])
    for value in values:
        yield from _where(_JUMP_EQUAL, value, answer)
    yield _step(_RETURN, _ALLOW)


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
