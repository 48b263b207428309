"""Pieces of a base's files for the process that merges: the interface of a `Feed`, and the feed of local files.

In: a directory. Out: the bytes of any part of its files, read into memory of the caller.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from merge_gate._internal.errors import SourceError
from merge_gate.records.files import FileSpan

PIECE_BYTES = 16 << 20
"""No read of a file asks for more: the system's page cache then drops what was used before it needs more memory."""


class Feed:
    """Where the bytes of a base come from. All methods may be called by several threads."""

    def open_files(self, files: Sequence[str]) -> None:
        """Open these files, so that later reads are of the files that are there now."""

    def expect(self, spans: Sequence[FileSpan], *, whole: bool, needed_now: bool = True) -> None:
        """Announce the spans that will be read, in this order, so that they can be read ahead.

        With `whole`, the rest of the files is read too, so that their digests are known. Until spans are `needed_now`,
        a read may ask for any bytes.
        """

    def read(self, file: str, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of the file from `start` on, announced or not.

        Raises:
            SourceError: not all of these bytes could be had.
        """
        raise NotImplementedError


class LocalFeed(Feed):
    """Reads the files of a directory. It maps none of them, and reads nothing ahead: the system does.

    Args:
        directory: the base's directory.
        keep: leave the bytes in the system's page cache. False if memory is limited.
    """

    def __init__(self, directory: str, *, keep: bool = True) -> None:
        self._directory, self._keep = directory, keep
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            for descriptor in self._files.values():
                with contextlib.suppress(OSError):
                    os.close(descriptor)
            self._files.clear()

    def open_files(self, files: Sequence[str]) -> None:
        with contextlib.suppress(OSError):  # the read of the file explains it
            for file in files:
                self._opened(file)

    def read(self, file: str, start: int, into: memoryview) -> None:
        into = into.cast("B")
        done = 0
        try:
            descriptor = self._opened(file)
            while done < len(into):
                count = os.preadv(descriptor, [into[done : done + PIECE_BYTES]], start + done)
                if not count:
                    break
                if not self._keep:
                    os.posix_fadvise(descriptor, start + done, count, os.POSIX_FADV_DONTNEED)
                done += count
        except OSError as error:
            raise SourceError(
                f"{file}: the bytes from {start + done:,} could not be read: {error.strerror}",
                hint="check the disk or the mount that holds the base, then run again",
            ) from error
        if done < len(into):
            raise SourceError(
                f"{file}: expected {len(into):,} bytes from {start:,}, got {done:,}: the file ends before them",
                hint="copy or download the base again: the file was cut or replaced while it was read",
            )

    def _opened(self, file: str) -> int:
        with self._lock:
            if file not in self._files:
                self._files[file] = os.open(Path(self._directory, file), os.O_RDONLY | os.O_CLOEXEC)
            return self._files[file]
