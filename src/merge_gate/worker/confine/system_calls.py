"""Refuses system calls that the worker does not need, by a seccomp filter.

The filter applies to this thread and the threads that it starts, whatever rights the process has.
https://docs.kernel.org/userspace-api/seccomp_filter.html

1. Network: only Unix sockets, without connecting them, and no io_uring (which bypasses filters).
2. Processes: only threads. No new program, and no tracing, reading, or signaling of another process.
3. Files: calls that change modes, owners, times, and attributes, which Landlock does not cover, do nothing and report
   success. Libraries copy files with their modes, and would fail otherwise.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterator

_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
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
_SOCKET, _CLONE, _KILL, _TGKILL = (41, 198), (56, 220), (62, 129), (234, 131)


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
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_SECCOMP, _MODE_FILTER, filter_, 0, 0):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


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
    for call in (_KILL, _TGKILL):
        yield from _only_with(call[column], _JUMP_EQUAL, os.getpid(), refused)
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
    yield _step(_LOAD, _FIRST_ARGUMENT_AT)
    yield from _unless(test, value, answer)
    yield _step(_RETURN, _ALLOW)


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
