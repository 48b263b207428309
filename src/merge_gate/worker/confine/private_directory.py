"""The worker's own directory: made for each, and taken away, also after a run that was killed.

In: nothing. Out: an empty directory. A lock of the system is held on it for as long as its run lives: what nobody holds
is of a dead run, and is removed by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX = "merge-gate-worker-"
_NAME = re.compile(rf"{PREFIX}[a-z0-9_]{{8}}")
_MODE = 0o700
"""Name and permissions that `tempfile` gives a directory; one that a user made has others."""

_YOUNG_S = 60.0
"""A directory this young may be one that is being made: its lock is not there yet."""


@contextlib.contextmanager
def private_directory() -> Iterator[str]:
    """A directory of this process's own, gone afterwards; those of dead runs are gone at once."""
    _remove_dead(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as directory:
        lock = os.open(directory, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield directory
        finally:
            os.close(lock)


def _remove_dead(parent: Path) -> None:
    with contextlib.suppress(OSError):
        for directory in parent.glob(f"{PREFIX}*"):
            if _NAME.fullmatch(directory.name):
                _remove_if_dead(directory)


def _remove_if_dead(directory: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            found = os.fstat(descriptor)
            mine = found.st_uid == os.getuid() and stat.S_ISDIR(found.st_mode) and stat.S_IMODE(found.st_mode) == _MODE
            if mine and time.time() - found.st_mtime > _YOUNG_S:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(descriptor)
