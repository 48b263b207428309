"""Whether a file is still the one that was looked at: its identity, by the system's own account.

In: an open file, or a base's directory. Out: `FileIdentity`s to be compared later. A write changes the times, a rename
the inode or its time of change (ctime), which no program can set back. Knows neither adapters nor reports.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from merge_gate.records.files import FileIdentity

if TYPE_CHECKING:
    from collections.abc import Iterator

_BASE_FILES = re.compile(r"config\.json|(model|pytorch_model)[-.].*|.*\.py")
"""The files of a base that decide what it holds; what else lies beside them may change."""


def identity_of(name: str, found: os.stat_result) -> FileIdentity:
    """The identity of a file by its `stat`."""
    return FileIdentity(
        name=name,
        device=found.st_dev,
        inode=found.st_ino,
        size_bytes=found.st_size,
        mtime_ns=found.st_mtime_ns,
        ctime_ns=found.st_ctime_ns,
    )


def base_identity(directory: str) -> tuple[FileIdentity, ...]:
    """The identities of the files that make a base, in the order of their names.

    Raises:
        OSError: the directory cannot be read.
    """
    return tuple(sorted(_base_files(directory), key=lambda one: one.name))


def _base_files(directory: str) -> Iterator[FileIdentity]:
    with os.scandir(directory) as entries:
        for entry in entries:
            if _BASE_FILES.fullmatch(entry.name):
                yield identity_of(entry.name, entry.stat())
