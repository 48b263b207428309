"""Records the identity of files (device, inode, size, times), so that a later comparison shows any change.

A write changes the times. A rename changes the inode or its ctime, which no program can set back.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate._internal.text import is_inside
from merge_gate.files.json_object import read_as_transformers
from merge_gate.records.files import FileIdentity

if TYPE_CHECKING:
    from collections.abc import Iterator

_BASE_FILES = re.compile(r"config\.json|(model|pytorch_model)[-.].*|.*\.(index\.json|py)")
"""Files that make a base, together with the files that an index or config.json names. Other files may change."""


def identity_of(name: str, stat: os.stat_result) -> FileIdentity:
    """The identity of a file by its `stat`."""
    return FileIdentity(
        name=name,
        device=stat.st_dev,
        inode=stat.st_ino,
        size_bytes=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        ctime_ns=stat.st_ctime_ns,
    )


def base_identity(directory: str) -> tuple[FileIdentity, ...]:
    """The identities of the files that make a base, in the order of their names.

    Raises:
        OSError: the directory cannot be read.
    """
    return tuple(sorted(_base_files(directory), key=lambda identity: identity.name))


def directory_identity(directory: str | Path) -> tuple[FileIdentity, ...]:
    """The identities of a directory, which comes first, and of everything in it. A link counts as what it leads to.

    Raises:
        OSError: something in it cannot be found any more.
    """
    places = [Path(directory)]
    for folder, folders, files in os.walk(directory):
        places += [Path(folder, name) for name in (*folders, *files)]
    return tuple(
        identity_of(str(place.relative_to(directory)), place.stat(follow_symlinks=place.exists()))
        for place in sorted(places)
    )


def _base_files(directory: str) -> Iterator[FileIdentity]:
    named: set[str] = set()
    with os.scandir(directory) as entries:
        for entry in entries:
            if _BASE_FILES.fullmatch(entry.name):
                identity = identity_of(entry.name, entry.stat())
                if entry.name.endswith((".index.json", "config.json")):
                    named |= _named_by(entry.path)
                yield identity
    for name in named:
        if "/" in name or not _BASE_FILES.fullmatch(name):
            yield identity_of(name, Path(directory, name).stat())


def _named_by(path: str) -> set[str]:
    """Existing weight files in the same directory that an index or config.json names; empty if it is unreadable."""
    content = read_as_transformers(path) or {}
    index = content.get("weight_map")
    values = [content.get("transformers_weights"), *(index.values() if isinstance(index, dict) else ())]
    named = {value for value in values if isinstance(value, str)}
    return {name for name in named if is_inside(name) and Path(path).parent.joinpath(name).is_file()}
