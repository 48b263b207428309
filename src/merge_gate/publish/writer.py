"""Writes the weight files of one model, in any order, and proves that the files contain the written bytes.

In: a layout, and the bytes of its tensors in parts. Out: files in a directory, and their SHA-256. It does not know
the meaning of the bytes.

1. Each file is created with its final size and its header.                                    `__init__`
2. Each part gets a checksum and is written at its place. A later part replaces an earlier one there.    `write`
3. Every byte of every tensor must have been written.                                          `missing`
4. The files go to disk and are read back: each part must have its checksum.                       `read_back`
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from merge_gate.errors import NotPublishedError
from merge_gate.files.headers import shown
from merge_gate.publish.layout import FileLayout, ModelLayout, Place
from merge_gate.records.files import FileRecord
from merge_gate.records.terms import record

CHUNK_BYTES = 16 << 20
MOST_PARTS = 1 << 16
"""Enough for a merged tensor of 256 GiB, which arrives in parts of 4 MiB or more."""

_EXISTING = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = _EXISTING | os.O_CREAT | os.O_EXCL
_LIBC, _SYNC_FILE_RANGE_WRITE = ctypes.CDLL(None), 2
_REREAD = "the disk or its driver loses data: publish to another disk"


@record
class _Part:
    size_bytes: int
    checksum: int


class ModelWriter:
    """The weight files of one model. One thread at a time may use it. No file stays open between two calls."""

    def __init__(self, directory: Path, layout: ModelLayout) -> None:
        self.layout = layout
        self._directory = directory
        self._places = layout.places()
        self._parts: dict[tuple[str, int], dict[int, _Part]] = {}
        for file in layout.files:
            path = directory / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with _opened(path, _NEW) as descriptor:
                os.ftruncate(descriptor, file.size_bytes)
                _write_all(descriptor, 0, memoryview(file.head))

    def places(self, name: str) -> tuple[Place, ...]:
        """Where a tensor is stored; empty if it is not."""
        return self._places.get(name, ())

    def write(self, name: str, offset: int, content: memoryview) -> None:
        """Write bytes of a tensor, from `offset` of the tensor on, to each of its places.

        Raises:
            ValueError: the tensor has no such bytes.
            OSError: the disk is full, or fails.
        """
        places = self.places(name)
        if not places or not 0 <= offset < offset + len(content) <= places[0].size_bytes:
            raise ValueError(f"{name}: {len(content)} bytes at {offset}")
        checksum = zlib.crc32(content)
        for place in places:
            with _opened(self._directory / place.tensor.file) as descriptor:
                _write_all(descriptor, place.start + offset, content)
                _begin_to_store(descriptor, place.start + offset, len(content))
            parts = self._parts.setdefault((place.tensor.file, place.start), {})
            end = offset + len(content)
            if parts.get(offset) is None or parts[offset].size_bytes != len(content):
                for start in [one for one, part in parts.items() if one < end and offset < one + part.size_bytes]:
                    del parts[start]
            if len(parts) >= MOST_PARTS:
                raise ValueError(f"{name}: more than {MOST_PARTS} parts")
            parts[offset] = _Part(size_bytes=len(content), checksum=checksum)

    def read(self, name: str, offset: int, into: memoryview) -> None:
        """Fill `into` with bytes of a tensor from `offset` on, as they are in the first file that has it.

        Raises:
            NotPublishedError: the file ends before.
            OSError: the disk fails.
        """
        place = self.places(name)[0]
        with _opened(self._directory / place.tensor.file) as descriptor:
            _read_all(descriptor, place.start + offset, into, place.tensor.file)

    def forget(self, place: Place) -> None:
        """Parts of this tensor that were written do not count."""
        self._parts.pop((place.tensor.file, place.start), None)

    def is_written(self, place: Place) -> bool:
        """Whether every byte of a tensor was written."""
        parts = self._parts.get((place.tensor.file, place.start), {})
        return sum(part.size_bytes for part in parts.values()) == place.size_bytes  # they do not overlap

    def missing(self) -> Iterator[Place]:
        """The places of tensors that were not written whole."""
        for file in self.layout.files:
            yield from (place for place in file.places if not self.is_written(place))

    def add_file(self, name: str, content: bytes) -> FileRecord:
        """Write another file of the model, whole.

        Raises:
            FileExistsError: there is one of that name.
            OSError: the disk is full, or fails.
        """
        path = self._directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with _opened(path, _NEW) as descriptor:
            _write_all(descriptor, 0, memoryview(content))
            os.fsync(descriptor)
            read = _read_whole(descriptor, len(content) + 1)
        if read != content:
            raise _other_bytes(name)
        return FileRecord(path=name, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    def read_back(self, go_on: Callable[[], None] = lambda: None) -> tuple[FileRecord, ...]:
        """Send the files to disk, read them again, and compare every part. Returns their digests.

        `go_on` is called for each piece, and may raise to end the reading.

        Raises:
            NotPublishedError: the disk has other bytes than were written.
            OSError: the disk fails.
        """
        for file in self.layout.files:
            go_on()
            with _opened(self._directory / file.name) as descriptor:
                os.fsync(descriptor)
        with ThreadPoolExecutor(1) as pool:
            return tuple(self._read_file(file, pool, go_on) for file in self.layout.files)

    def _read_file(self, file: FileLayout, pool: ThreadPoolExecutor, go_on: Callable[[], None]) -> FileRecord:
        with _opened(self._directory / file.name) as descriptor:
            return self._read_opened(descriptor, file, pool, go_on)

    def _read_opened(
        self, descriptor: int, file: FileLayout, pool: ThreadPoolExecutor, go_on: Callable[[], None]
    ) -> FileRecord:
        """Another thread hashes the file, while this one compares checksums."""
        if os.fstat(descriptor).st_size != file.size_bytes or _read_whole(descriptor, len(file.head)) != file.head:
            raise _other_bytes(file.name)
        whole = hashlib.sha256(file.head)
        buffers = [memoryview(bytearray(CHUNK_BYTES)), memoryview(bytearray(CHUNK_BYTES))]
        hashing = None
        for place in file.places:
            parts = self._parts.get((file.name, place.start), {})
            for offset, part in sorted(parts.items()):
                checksum = 0
                for start in range(offset, offset + part.size_bytes, CHUNK_BYTES):
                    go_on()
                    buffers.reverse()
                    piece = buffers[0][: min(CHUNK_BYTES, offset + part.size_bytes - start)]
                    _read_all(descriptor, place.start + start, piece, file.name)
                    if hashing is not None:
                        hashing.result()
                    hashing = pool.submit(whole.update, piece)
                    checksum = zlib.crc32(piece, checksum)
                if checksum != part.checksum:
                    raise _other_bytes(file.name, place.tensor.name)
        if hashing is not None:
            hashing.result()
        return FileRecord(path=file.name, size_bytes=file.size_bytes, sha256=whole.hexdigest())


@contextlib.contextmanager
def _opened(path: Path, flags: int = _EXISTING) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, start: int, content: memoryview) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], start + done)


def _read_all(descriptor: int, start: int, into: memoryview, file: str) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done:]], start + done)
        if not count:
            raise _other_bytes(file)
        done += count


def _read_whole(descriptor: int, size_bytes: int) -> bytes:
    content = bytearray()
    while len(content) < size_bytes and (piece := os.pread(descriptor, size_bytes - len(content), len(content))):
        content += piece
    return bytes(content)


def _begin_to_store(descriptor: int, start: int, size_bytes: int) -> None:
    """Let the disk begin to write these bytes, so that fsync waits for few. The call returns at once."""
    with contextlib.suppress(AttributeError):  # not Linux with glibc or musl
        _LIBC.sync_file_range(descriptor, ctypes.c_int64(start), ctypes.c_int64(size_bytes), _SYNC_FILE_RANGE_WRITE)


def _other_bytes(file: str, tensor: str | None = None) -> NotPublishedError:
    of_tensor = f" of {shown(tensor)}" if tensor is not None else ""
    return NotPublishedError(f"{shown(file)} was read back with other bytes{of_tensor} than were written", hint=_REREAD)
