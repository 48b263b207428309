"""A directory that only one process uses at a time.

In: the path of a directory. Out: the system's lock on it. Standard library of Python 3.9 only, because the action uses
it too.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING, NamedTuple

with contextlib.suppress(ImportError):  # not on Windows, where the action ends before it needs a lock
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_FLAGS = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_HELD = frozenset({errno.EWOULDBLOCK, errno.EACCES})


class AlreadyLockedError(Exception):
    """Another process holds the directory."""


class DirectoryLock(NamedTuple):
    """An open directory. `is_held` is False on a file system without locks."""

    descriptor: int
    is_held: bool


@contextlib.contextmanager
def locked_directory(path: str | Path, *, follow: bool = True) -> Iterator[DirectoryLock]:
    """Hold the lock of a directory. The system ends it with the process, however that ends, and it leaves no file.

    Args:
        path: the directory.
        follow: whether `path` may be a symbolic link.

    Raises:
        AlreadyLockedError: another process holds it.
        OSError: the directory cannot be opened.
    """
    descriptor = os.open(path, _FLAGS if follow else _FLAGS | _NO_LINK)
    try:
        yield DirectoryLock(descriptor, _is_locked(descriptor))
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise AlreadyLockedError from error
        return False
    return True
