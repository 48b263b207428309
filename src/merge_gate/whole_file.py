"""A file that is written whole or not at all.

In: a path, and what is to stand there. Out: that file; or, whatever goes wrong, what stood there before. Standard
library of Python 3.9 only: the action writes with it as well.
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
    """Open a file for writing that takes its name when the block ends, and is gone when the block raises.

    It is made anew under a name of its own (`.NAME.….tmp`), with the permissions that the umask leaves. A link at its
    name is replaced and not written through.

    Args:
        path: the file; in `folder`, where that is given.
        folder: descriptor of a directory that is held open.
        lasts: it is there after a crash of the machine as well. Some file systems cannot promise that of its name.

    Raises:
        OSError: it cannot be written.
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
        _sync(path.parent)


def _sync(folder: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
