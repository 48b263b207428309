"""Makes a temporary directory for a worker or another part of a run, and removes it, even after a run that was killed.

The run locks its directory (`flock`) for as long as it lives. The next run removes directories without a lock.
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

from merge_gate._internal.locked_directory import AlreadyLockedError, locked_directory

PREFIX = "merge-gate-worker-"
_ENDING = re.compile(r"[a-z0-9_]{8}")
_MODE = 0o700
"""The name and permissions that `tempfile` gives a directory. A user's own directory differs."""

_MIN_AGE_S = 60.0
"""A younger directory may not be locked yet, because it was just made."""


@contextlib.contextmanager
def private_directory(parent: str | Path | None = None, prefix: str = PREFIX) -> Iterator[str]:
    """Remove the directories of dead runs, and make a directory that is removed at the end."""
    _remove_dead(Path(parent or tempfile.gettempdir()), prefix)
    directories = tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True)
    with directories as directory, locked_directory(directory):
        yield directory


def _remove_dead(parent: Path, prefix: str) -> None:
    with contextlib.suppress(OSError):
        for directory in parent.glob(f"{prefix}*"):
            if _ENDING.fullmatch(directory.name.removeprefix(prefix)):
                _remove_if_dead(directory)


def _remove_if_dead(directory: Path) -> None:
    with contextlib.suppress(OSError, AlreadyLockedError):
        # 1. Look before locking: its run may be about to lock a young one.
        status = directory.lstat()
        is_own = status.st_uid == os.getuid() and stat.S_ISDIR(status.st_mode) and stat.S_IMODE(status.st_mode) == _MODE
        if not is_own or time.time() - status.st_mtime <= _MIN_AGE_S:
            return
        # 2. Remove what no process holds, and what is still there.
        with locked_directory(directory, follow=False) as lock:
            if lock.is_held and os.path.samestat(status, os.fstat(lock.descriptor)):
                shutil.rmtree(directory, ignore_errors=True)
