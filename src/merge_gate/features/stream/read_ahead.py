"""The weight files of bases, read ahead of use, in order and over several connections, into a bounded window.

In: the files of a base, wherever they are, and the spans that will be read. Out: their bytes, once they were hashed.

1. The files are cut into pieces, in the order in which they are used.                            `plan`
2. Several threads read pieces into the free slots of the window. The due one has a slot first.
3. One thread hashes the pieces in order.
4. A piece is copied out when it was hashed. Its slot is free again after the last expected byte.  `ReadAhead.read`
"""

from __future__ import annotations

import bisect
import hashlib
import mmap
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from merge_gate._internal.errors import SourceError
from merge_gate.files.feed import PIECE_BYTES, LocalFeed
from merge_gate.files.headers import shown
from merge_gate.files.identity import base_identity
from merge_gate.records.files import FileSpan

if TYPE_CHECKING:
    from merge_gate.features.stream.hub_file import HubFiles

CONNECTIONS = 8
"""Pieces that are read at a time: over a network, the rate grows with them."""

MOST_BASE_BYTES = 1 << 44
"""A million pieces. The largest models have a tenth of that; a sparse file, or a hostile server, can state any size."""


CHUNK_BYTES = 1 << 20
"""The unit in which bytes that are read again are compared with the first ones."""

_DIGEST_CHARACTERS = 16


class LocalFiles(LocalFeed):
    """The weight files of a base in a directory.

    Raises:
        SourceError: they cannot be read, or are too large for any model.

    Attributes:
        sizes: the size of each file in bytes.
        sha256: the digests that are expected. No one lists those of local files.
        identity: that of the base's files before the first byte was read.
    """

    def __init__(self, directory: str, names: Sequence[str], *, keep: bool = True) -> None:
        super().__init__(directory, keep=keep)
        self.sha256: Mapping[str, str] = {}
        try:
            self.identity = base_identity(directory)
            self.sizes: Mapping[str, int] = {name: Path(directory, name).stat().st_size for name in names}
        except OSError as error:
            raise SourceError(
                f"the base's files cannot be read: {error.strerror}",
                hint="check the disk or the mount that holds the base, then run again",
            ) from error
        refuse_excess(self.sizes)


BaseBytes: TypeAlias = "LocalFiles | HubFiles"


def refuse_excess(sizes: Mapping[str, int]) -> None:
    """Refuse a base whose list of pieces would take more memory than there is.

    Raises:
        SourceError: the files are too large.
    """
    total = sum(sizes.values())
    if total > MOST_BASE_BYTES:
        raise SourceError(
            f"the base's weight files have {total:,} bytes together, more than {MOST_BASE_BYTES:,}",
            hint="check the base: no model has files of that size",
        )


class FedBase:
    """The files of one base, and the SHA-256 of what passed of them, which outlives the processes that read them.

    Files with an expected digest are also compared with what passed before, whenever they are read again. `on_complete`
    is called with the digest of each file when all bytes have passed, by a thread of the pass.
    """

    def __init__(self, files: BaseBytes, on_complete: Callable[[Mapping[str, str]], None] = lambda _: None) -> None:
        self.files, self.on_complete = files, on_complete
        self._adding = threading.Lock()
        self._chunks: dict[tuple[str, int], bytes] = {}
        self.known: dict[str, str] = {}
        self.begin()

    def begin(self) -> None:
        """Start a pass: every file that is not yet known begins with its first byte."""
        with self._adding:
            self._hashes = {file: hashlib.sha256() for file in self.files.sizes if file not in self.known}
            self._hashed = dict.fromkeys(self._hashes, 0)

    @property
    def are_complete(self) -> bool:
        return len(self.known) == len(self.files.sizes)

    def add(self, file: str, start: int, content: memoryview) -> None:
        """Add the next bytes of a file. Bytes out of order, or of a file that is known, are only compared.

        Raises:
            SourceError: the file has another digest than expected, or its bytes changed.
        """
        self.compare(file, start, content)
        with self._adding:
            self._add(file, start, content)

    def _add(self, file: str, start: int, content: memoryview) -> None:
        if self._hashed.get(file) != start or file in self.known:
            return
        self._hashes[file].update(content)
        self._hashed[file] += len(content)
        if self._hashed[file] < self.files.sizes[file]:
            return
        got = self._hashes[file].hexdigest()
        expected = self.files.sha256.get(file, got)
        if got != expected:
            raise SourceError(
                f"{shown(file)} arrived with other bytes than the Hub lists: its SHA-256 is "
                f"{got[:_DIGEST_CHARACTERS]}…, expected {expected[:_DIGEST_CHARACTERS]}…",
                hint="run again; if it happens again, check HF_ENDPOINT and any proxy, which may change files",
            )
        self.known[file] = got

    def compare(self, file: str, start: int, content: memoryview) -> None:
        """Compare whole chunks with what passed before, for files with an expected digest.

        Raises:
            SourceError: they differ.
        """
        if file not in self.files.sha256:
            return
        for offset in range(-start % CHUNK_BYTES, len(content), CHUNK_BYTES):
            chunk = content[offset : offset + CHUNK_BYTES]
            if len(chunk) < CHUNK_BYTES and start + offset + len(chunk) < self.files.sizes[file]:
                return
            digest = hashlib.sha256(chunk).digest()  # not a checksum: a hostile server would forge it
            if self._chunks.setdefault((file, start + offset), digest) != digest:
                raise SourceError(
                    f"{shown(file)} changed while it was read: its bytes from {start + offset:,} are different now",
                    hint="run again; if it happens again, check HF_ENDPOINT and any proxy, which may change files",
                )

    def read(self, file: str, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of a file from `start` on. Bytes that passed before must be the same.

        Raises:
            SourceError: they could not be had, or have changed.
        """
        if file not in self.files.sha256:
            self.files.read(file, start, into)
            return
        first, last = widened(start, start + len(into), self.files.sizes[file])
        chunks = memoryview(bytearray(last - first))
        self.files.read(file, first, chunks)
        self.compare(file, first, chunks)
        into[:] = chunks[start - first : start - first + len(into)]


class Window:
    """Memory for pieces. To look at it, or at the state of a piece in it, hold `changed`."""

    def __init__(self, slots: int) -> None:
        memory = memoryview(mmap.mmap(-1, slots * PIECE_BYTES))
        self.free = [memory[start : start + PIECE_BYTES] for start in range(0, len(memory), PIECE_BYTES)]
        self.changed = threading.Condition()


@dataclass(slots=True, eq=False)
class _Piece:
    """Bytes of a file. `left` counts those that are expected and were not read yet."""

    span: FileSpan
    left: int = 0
    slot: memoryview | None = None
    has_arrived: bool = False
    was_read: bool = False

    @property
    def content(self) -> memoryview:
        assert self.slot is not None  # noqa: S101 - it is being read, or has arrived
        return self.slot[: self.span.end - self.span.start]


class ReadAhead:
    """One pass over a base, from `start` until every piece was hashed, or until `cancel`.

    `needed_now`: the spans are read now, so that what fills the window and is not read is in the way. Until then, each
    read is of the base itself.
    """

    def __init__(
        self,
        base: FedBase,
        spans: Sequence[FileSpan],
        window: Window,
        *,
        whole: bool,
        needed_now: bool = True,
    ) -> None:
        self.base, self.spans, self.whole, self.needed_now = base, spans, whole, needed_now
        self._window, self._changed = window, window.changed
        sizes = base.files.sizes
        self._pieces = [_Piece(span) for span in plan(spans, sizes, base.known if whole else sizes)]
        self._of_file: dict[str, list[_Piece]] = {}
        for piece in self._pieces:
            self._of_file.setdefault(piece.span.file, []).append(piece)
        self._left = self._count(spans)
        self._error: Exception | None = None
        self._next = 0
        self._is_over = self._is_done = False

    def _count(self, spans: Sequence[FileSpan]) -> int:
        """Count the expected bytes of each piece. Returns their sum."""
        for file, ranges in _joined(spans).items():
            for start, end in ranges:
                place = start
                while place < end:
                    piece, until = self._at(file, place, end)
                    assert piece is not None  # noqa: S101 - the pieces hold all spans
                    piece.left += until - place
                    place = until
        return sum(piece.left for piece in self._pieces)

    def _at(self, file: str, place: int, end: int) -> tuple[_Piece | None, int]:
        """The piece that holds a place, and up to which byte before `end` that is so."""
        pieces = self._of_file.get(file, [])
        index = bisect.bisect_right(pieces, place, key=lambda piece: piece.span.start)
        if index and place < pieces[index - 1].span.end:
            return pieces[index - 1], min(pieces[index - 1].span.end, end)
        return None, min(pieces[index].span.start, end) if index < len(pieces) else end

    def start(self) -> None:
        """Begin to read."""
        self.base.begin()
        for work in (*(self._fill for _ in range(CONNECTIONS)), self._pass_on):
            threading.Thread(target=work, daemon=True).start()

    def cancel(self, error: Exception | None = None) -> None:
        """Stop reading ahead. Reads that wait get the error, or read the base itself."""
        with self._changed:
            self._is_over, self._error = True, self._error or error
            for piece in self._pieces:
                if piece.was_read:
                    self._release(piece)
            self._changed.notify_all()

    def _release(self, piece: _Piece) -> None:
        if piece.slot is not None:
            self._window.free.append(piece.slot)
        piece.slot = None
        self._changed.notify_all()

    # --- 2. --------------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        while (piece := self._begun()) is not None:
            error = None
            try:
                self.base.files.read(piece.span.file, piece.span.start, piece.content)
            except Exception as raised:  # noqa: BLE001 - it is raised in the order of the pieces
                error = raised
            with self._changed:
                self._error = self._error or error
                piece.has_arrived = error is None and not self._is_over and not self._is_done
                if not piece.has_arrived:
                    self._release(piece)
                self._changed.notify_all()

    def _begun(self) -> _Piece | None:
        """The next piece, with a slot; None after the last."""
        with self._changed:
            self._changed.wait_for(lambda: self._window.free or self._is_at_end())
            if self._is_at_end():
                return None
            piece = self._pieces[self._next]
            piece.slot, self._next = self._window.free.pop(), self._next + 1
            return piece

    def _is_at_end(self) -> bool:
        return self._is_over or self._error is not None or self._next >= len(self._pieces)

    # --- 3. --------------------------------------------------------------------------------------------------------

    def _pass_on(self) -> None:
        error = None
        try:
            if all(map(self._was_read, self._pieces)) and self.base.are_complete:
                self.base.on_complete(self.base.known)
        except Exception as raised:  # noqa: BLE001 - the readers get it
            error = raised
        with self._changed:
            self._error, self._is_done = self._error or error, True
            for piece in self._pieces:
                if piece.has_arrived and not piece.was_read:
                    self._release(piece)
            self._changed.notify_all()

    def _was_read(self, piece: _Piece) -> bool:
        """Hash a piece when it has arrived. False if it does not come any more."""
        with self._changed:
            self._changed.wait_for(lambda: piece.has_arrived or self._error is not None or self._is_over)
            if not piece.has_arrived or self._is_over:
                return False
        self.base.add(piece.span.file, piece.span.start, piece.content)
        with self._changed:
            piece.was_read = True
            if piece.left <= 0 or self._is_over:
                self._release(piece)
            self._changed.notify_all()
        return True

    # --- 4. --------------------------------------------------------------------------------------------------------

    def read(self, file: str, start: int, into: memoryview) -> int:
        """Fill `into` with bytes from `start` on, as far as a piece goes, and return how far that is.

        What was not expected, or was read before, comes from the base itself. The read that takes the last expected
        byte returns when all pieces were hashed.

        Raises:
            SourceError: these bytes could not be had, or an earlier piece.
        """
        piece, end = self._at(file, start, start + len(into))
        into = into[: end - start]
        if not self.needed_now or piece is None or not self._copied(piece, start, into):
            self.base.read(file, start, into)
        return len(into)

    def _copied(self, piece: _Piece, start: int, into: memoryview) -> bool:
        with self._changed:
            while piece.left > 0 and not self._is_over and not piece.was_read:
                self._raise_error()
                self._wait()
            self._raise_error()
            if piece.slot is None or not piece.was_read:
                return False
            into[:] = piece.content[start - piece.span.start :][: len(into)]
            self._take(piece, len(into))
            while not self._left and not self._is_done and not self._is_over:
                self._changed.wait()
            self._raise_error()
        return True

    def _take(self, piece: _Piece, count: int) -> None:
        count = min(count, piece.left)
        piece.left -= count
        self._left -= count
        if not piece.left:
            self._release(piece)

    def _wait(self) -> None:
        """Wait for a change. If no one reads what fills the window, drop the oldest piece: it was skipped."""
        held = [piece for piece in self._pieces[: self._next] if piece.slot is not None]
        if held and not self._window.free and all(piece.was_read for piece in held):
            self._take(held[0], held[0].left)
        else:
            self._changed.wait()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


# --- 1. ------------------------------------------------------------------------------------------------------------


def plan(spans: Iterable[FileSpan], sizes: Mapping[str, int], known: Iterable[str]) -> tuple[FileSpan, ...]:
    """The pieces that hold these spans, in the order of the files' first use.

    A file whose digest is not known is read whole, even if no span is in it. For other files, only the chunks that hold
    spans are read.
    """
    wanted = [(span.file, *widened(span.start, span.end, sizes[span.file])) for span in spans]
    wanted += [(file, 0, size_bytes) for file, size_bytes in sizes.items() if file not in known and size_bytes]
    chunks = _joined(FileSpan(file=file, start=start, end=end) for file, start, end in wanted)
    return tuple(
        FileSpan(file=file, start=place, end=min(place + PIECE_BYTES, end))
        for file, ranges in chunks.items()
        for start, end in ranges
        for place in range(start, end, PIECE_BYTES)
    )


def _joined(spans: Iterable[FileSpan]) -> dict[str, list[tuple[int, int]]]:
    """The ranges of each file, in order. Those that touch or overlap are one."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    for span in spans:
        ranges.setdefault(span.file, []).append((span.start, span.end))
    for file, unordered in ranges.items():
        joined: list[tuple[int, int]] = []
        for start, end in sorted(unordered):
            if joined and start <= joined[-1][1]:
                joined[-1] = joined[-1][0], max(end, joined[-1][1])
            else:
                joined.append((start, end))
        ranges[file] = joined
    return ranges


def widened(start: int, end: int, size_bytes: int) -> tuple[int, int]:
    """The whole chunks that hold a range of a file of this size."""
    return start - start % CHUNK_BYTES, min(end + -end % CHUNK_BYTES, size_bytes)
