"""Pieces of files, read in order and ahead of use, over several connections into a bounded window.

In: pieces in the order in which they are used, and a window. Out: each piece with its slot, in that order. The bytes
of each file pass through `Digests`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from merge_gate.records.files import FileIdentity
from merge_gate.sources.digests import Digests, widened
from merge_gate.sources.feed import PIECE_BYTES, FileSpan, SourceError
from merge_gate.sources.window import Window, WindowSlot


class BaseBytes(Protocol):
    """The weight files of one base, wherever they are. All methods may be called by several threads."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """The size of each file in bytes."""

    @property
    def sha256(self) -> Mapping[str, str]:
        """The digests that are expected, for files for which they are known."""

    @property
    def identity(self) -> tuple[FileIdentity, ...]:
        """The identity of the files in the base's directory, before the first byte was read."""

    def read(self, file: str, start: int, into: memoryview) -> None:
        """Fill `into` with the file's bytes from `start` on, or raise a `SourceError`."""


class Receiver(Protocol):
    """Gets the pieces. Its methods are called by one thread at a time."""

    def deliver(self, span: FileSpan, slot: WindowSlot) -> None:
        """The next piece, whose slot the receiver owns from now on."""

    def finish(self, error: Exception | None) -> None:
        """All pieces were delivered, or this error ended the reading."""


class ReadAhead:
    """Reads pieces on `connections` threads, from `start` until all are delivered, or until `cancel`.

    The window must have more slots than there are threads, or the piece that is due next may find none.
    """

    def __init__(
        self,
        files: BaseBytes,
        pieces: Sequence[FileSpan],
        window: Window,
        digests: Digests,
        receiver: Receiver,
        *,
        connections: int,
    ) -> None:
        self._files, self._pieces, self._window = files, pieces, window
        self._digests, self._receiver = digests, receiver
        self._slots: dict[int, WindowSlot] = {}
        self._error: Exception | None = None
        self._next = 0
        self._changed = threading.Condition()
        self._taking = threading.Lock()
        self._is_over = False
        workers = [threading.Thread(target=self._read, daemon=True) for _ in range(connections)]
        self._threads = [*workers, threading.Thread(target=self._pass_on, daemon=True)]

    def start(self) -> None:
        """Begin to read."""
        for thread in self._threads:
            thread.start()

    def cancel(self) -> None:
        """Read and deliver no more. What is being read is released when it has arrived."""
        with self._changed:
            self._is_over = True
            slots, self._slots = self._slots, {}
            self._changed.notify_all()
        self._window.wake()
        for slot in slots.values():
            self._window.release(slot)

    def join(self, timeout_s: float) -> bool:
        """Wait for the threads. False if one is still reading after this time for each."""
        for thread in self._threads:
            thread.join(timeout_s)
        return not any(thread.is_alive() for thread in self._threads)

    def _read(self) -> None:
        try:
            while (taken := self._take()) is not None:
                number, slot = taken
                self._fill(number, slot)
        except Exception as error:  # noqa: BLE001 - it is reported in the order of the pieces
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _take(self) -> tuple[int, WindowSlot] | None:
        """The next piece and a slot for it. Both are taken at once: the piece that is due first has a slot first."""
        with self._taking:
            if self._is_over or self._error is not None or self._next >= len(self._pieces):
                return None
            piece = self._pieces[self._next]
            slot = self._window.acquire(piece.end - piece.start, is_over=lambda: self._is_over)
            if slot is None:
                return None
            number, self._next = self._next, self._next + 1
            return number, slot

    def _fill(self, number: int, slot: WindowSlot) -> None:
        piece = self._pieces[number]
        try:
            self._files.read(piece.file, piece.start, self._window.view(slot))
        except Exception:
            self._window.release(slot)
            raise
        with self._changed:
            if not self._is_over:
                self._slots[number] = slot
                self._changed.notify_all()
                return
        self._window.release(slot)

    def _pass_on(self) -> None:
        """Hash and deliver each piece when it is due."""
        for number, piece in enumerate(self._pieces):
            with self._changed:
                self._changed.wait_for(lambda number=number: number in self._slots or self._error or self._is_over)  # type: ignore[misc]
                slot = self._slots.pop(number, None)
            if slot is None:
                self._end(self._error)
                return
            try:
                self._digests.add(piece.file, piece.start, self._window.view(slot))
            except Exception as error:  # noqa: BLE001 - the receiver gets it
                self._window.release(slot)
                self._end(error)
                return
            self._receiver.deliver(piece, slot)
        self._end(None)

    def _end(self, error: Exception | None) -> None:
        if not self._is_over:
            self._receiver.finish(error)
        self.cancel()


MOST_BASE_BYTES = 1 << 44
"""A million pieces. The largest models have a tenth of that; a sparse file, or a hostile server, can state any size."""


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


def plan(spans: Iterable[FileSpan], sizes: Mapping[str, int], known: Iterable[str]) -> tuple[FileSpan, ...]:
    """The pieces that hold these spans, in the order of the files' first use.

    A file whose digest is not known is read whole, also if no span is in it. Of the others, only the chunks that hold
    spans are read.
    """
    spans_of: dict[str, list[tuple[int, int]]] = {}
    for span in spans:
        spans_of.setdefault(span.file, []).append(widened(span.start, span.end, sizes[span.file]))
    for file in sizes:
        if file not in known:
            spans_of[file] = [(0, sizes[file])]
    return tuple(piece for file, ranges in spans_of.items() for piece in _cut(file, ranges))


def _cut(file: str, ranges: list[tuple[int, int]]) -> Iterable[FileSpan]:
    """Ranges of one file in pieces: joined if they touch or overlap, then cut."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    for start, end in joined:
        for place in range(start, end, PIECE_BYTES):
            yield FileSpan(file=file, start=place, end=min(place + PIECE_BYTES, end))
