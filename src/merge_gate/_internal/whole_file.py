"""Writes a file whole or not at all: if anything goes wrong, the old file stays.

It uses only the standard library of Python 3.9, because the action uses it too.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


@contextlib.contextmanager
def whole_file(path: Path, *, folder: int | None = None, lasts: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file for writing. It gets its name at the end of the block, or is removed if the block raises.

    The temporary file (`.NAME.….tmp`) is new, with permissions by the umask. A link at the final name is replaced, not
    followed.

    Args:
        path: the file; relative to `folder`, if that is given.
        folder: the descriptor of an open directory.
        lasts: whether the file survives a crash of the machine. Some file systems cannot guarantee this for its name.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, _FLAGS, 0o666, dir_fd=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            if lasts:
                file.flush()
                os.fsync(descriptor)
        os.replace(temporary, path, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise
    if lasts:
        sync_directory(path.parent)


def sync_directory(folder: Path) -> None:
    """Let the names in a directory survive a crash of the machine. Some file systems cannot sync a directory."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
