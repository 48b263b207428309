"""Restricts writes by Landlock: this process and its children can change only the files that it is given.

Reading is not restricted. Call it before a second thread starts: a running thread is not restricted.
https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable
from pathlib import Path

_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446  # the same numbers on every architecture
_VERSION, _PATH_BENEATH = 1, 1

_WRITE_FILE, _TRUNCATE = 1 << 1, 1 << 14
_MAKE_AND_REMOVE = sum(1 << bit for bit in range(4, 13))
_REFER = 1 << 13
_TCP = 1 << 0 | 1 << 1  # bind, connect
_OUTSIDE = 1 << 0 | 1 << 1  # abstract sockets of others, signals to others
_SINCE = {"refer": 2, "truncate": 3, "tcp": 4, "scopes": 6}
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
    tcp = _TCP if version >= _SINCE["tcp"] else 0
    scopes = _OUTSIDE if version >= _SINCE["scopes"] else 0
    restrictions = struct.pack("=QQQ", writes, tcp, scopes)
    rules = _call(_CREATE, restrictions, ctypes.c_size_t(len(restrictions)), 0)
    try:
        for path in allowed:
            _allow(rules, path, writes)
        _call(_RESTRICT, rules, 0)
    finally:
        os.close(rules)


def _allow(rules: int, path: Path, writes: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            writes &= _WRITE_FILE | _TRUNCATE
        _call(_ADD_RULE, rules, _PATH_BENEATH, struct.pack("=Qi", writes, descriptor), 0)
    finally:
        os.close(descriptor)


def _call(number: int, *arguments: object) -> int:
    result: int = ctypes.CDLL(None, use_errno=True).syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
