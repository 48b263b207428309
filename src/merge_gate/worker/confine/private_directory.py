"""The worker's own directory: made for each worker, and removed afterwards.

In: nothing. Out: an empty directory. A run holds the system's lock on its directory. A directory that no process holds
is of a killed run, and the next run removes it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from merge_gate.claimed_directory import AlreadyLockedError, locked_directory

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
    directories = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
    with directories as directory, locked_directory(directory):
        yield directory


def _remove_dead(parent: Path) -> None:
    with contextlib.suppress(OSError):
        for directory in parent.glob(f"{PREFIX}*"):
            if _NAME.fullmatch(directory.name):
                _remove_if_dead(directory)


def _remove_if_dead(directory: Path) -> None:
    with contextlib.suppress(OSError, AlreadyLockedError):
        # 1. Look before locking: its run may be about to lock a young one.
        found = directory.lstat()
        is_own = found.st_uid == os.getuid() and stat.S_ISDIR(found.st_mode) and stat.S_IMODE(found.st_mode) == _MODE
        if not is_own or time.time() - found.st_mtime <= _YOUNG_S:
            return
        # 2. Remove what no process holds, and what is still there.
        with locked_directory(directory, follow=False) as lock:
            if lock.is_held and os.path.samestat(found, os.fstat(lock.descriptor)):
                shutil.rmtree(directory, ignore_errors=True)
