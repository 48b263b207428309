"""The one way to open a file of unknown origin.

In: a path, or a name in an open directory. Out: an open regular file, or an error that names the kind of the file.
Standard library of Python 3.9 only, because the action uses it too.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import BufferedReader
    from pathlib import Path

_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_CHUNK_BYTES = 1024 * 1024

_KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
)


class RefusedFileError(OSError):
    """A file that is not read. The text continues a sentence that names the file."""

    def __str__(self) -> str:
        return str(self.strerror)


class NotRegularFileError(RefusedFileError):
    """Something else than a regular file has that name; `kind` says what."""

    def __init__(self, kind: str) -> None:
        super().__init__(errno.EINVAL, f"it is {kind}, expected a regular file")
        self.kind = kind


class TooLargeFileError(RefusedFileError):
    """The file has more bytes than its reader allows."""


def open_regular_file(path: str | Path, *, folder: int | None = None, follow: bool = False) -> BufferedReader:
    """Open a regular file for reading.

    Args:
        path: the file; a name in `folder` if that is given.
        folder: descriptor of an open directory.
        follow: whether a symbolic link at the name may lead to the file.

    Raises:
        NotRegularFileError: a link, directory, pipe, socket, or device is there.
        OSError: the file cannot be opened.
    """
    # 1. Look before opening: opening a device can already do something.
    _refuse_other_kinds(os.stat(path, dir_fd=folder, follow_symlinks=follow).st_mode)
    # 2. Another file may have taken the name since: do not follow a link, do not wait for the writer of a pipe.
    descriptor = os.open(path, _FLAGS if follow else _FLAGS | _NO_LINK, dir_fd=folder)
    # 3. Look again, at what is open.
    try:
        _refuse_other_kinds(os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular_file(path: str | Path, max_bytes: int, *, folder: int | None = None) -> bytes:
    """All bytes of a regular file that no link leads to.

    Raises:
        NotRegularFileError: a link, directory, pipe, socket, or device is there.
        TooLargeFileError: the file has more than `max_bytes`.
        OSError: the file cannot be read.
    """
    with open_regular_file(path, folder=folder) as file:
        return read_all(file, max_bytes)


def read_all(file: BufferedReader, max_bytes: int) -> bytes:
    """All bytes of an open file. Raises `TooLargeFileError` if they are more than `max_bytes`."""
    return b"".join(chunks(file, max_bytes))


def chunks(file: BufferedReader, max_bytes: int) -> Iterator[bytes]:
    """The bytes of an open file in pieces. Raises `TooLargeFileError` once they are more than `max_bytes`."""
    size_bytes = os.fstat(file.fileno()).st_size
    if size_bytes > max_bytes:
        raise TooLargeFileError(errno.EFBIG, f"it has {size_bytes} bytes, expected at most {max_bytes}")
    left_bytes = max_bytes
    while chunk := file.read(min(_CHUNK_BYTES, left_bytes + 1)):
        left_bytes -= len(chunk)
        if left_bytes < 0:
            raise TooLargeFileError(errno.EFBIG, f"it grew beyond {max_bytes} bytes")
        yield chunk


def _refuse_other_kinds(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise NotRegularFileError(next((kind for is_kind, kind in _KINDS if is_kind(mode)), "a device"))
