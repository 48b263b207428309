"""The worker's side of the feed: gets bytes of a base's files from the parent, which reads them (feed_service.py).

In: spans that will be read, and reads. Out: the bytes, copied out of a window of shared memory. A slot of the window is
released as soon as all that is expected of it was copied.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from merge_gate.records.refusals import NotJudged
from merge_gate.sources.feed import PIECE_BYTES, FileSpan, SourceError
from merge_gate.worker.channel import Channel, GarbledError
from merge_gate.worker.protocol import (
    BytesRequested,
    FeedEnded,
    FeedOpened,
    PieceArrived,
    SlotReleased,
    SpansExpected,
)

_COUNT_BYTES = 4
_REQUESTS_AT_ONCE = 4
"""Pieces of one read that are requested before the first has arrived."""


class FeedClient:
    """A `Feed` over the connection to the parent. `open` chooses the base that it reads."""

    def __init__(self, end: socket.socket) -> None:
        self._socket, self._channel = end, Channel(end)
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._windows: tuple[int, ...] = ()
        self._listener: threading.Thread | None = None
        self._slots = 0
        self._is_lost = False
        self._number, self._at_once = 0, 0
        self._expected = _Ranges()
        self._prefetched: tuple[list[FileSpan], bool] | None = None  # until it is announced
        self._pieces: list[_Piece] = []  # in the order in which they arrived
        self._answers: dict[int, PieceArrived] = {}
        self._abandoned: set[int] = set()
        self._ended: dict[int, NotJudged | None] = {}

    def open(self, group: int) -> FeedClient:
        """Read the base of this group of the job from now on.

        Raises:
            SourceError: the parent cannot open its files.
        """
        self._forget()
        self._ask_to_open(FeedOpened(group=group))
        return self

    def open_aside(self, group: int) -> AsideFeed:
        """Read another group's files next to those of the base.

        Raises:
            SourceError: the parent cannot open them.
        """
        self._ask_to_open(FeedOpened(group=group, aside=True))
        return AsideFeed(self)

    def read_aside(self, file: str, start: int, into: memoryview) -> None:
        """Fill `into` with bytes of the directory that was opened aside."""
        self._read_at_once(file, start, into.cast("B"), aside=True)

    def _ask_to_open(self, request: FeedOpened) -> None:
        with self._changed:
            self._ended.pop(0, None)
        self._send(request)
        if self._listener is None:
            self._receive_windows()
            self._listener = threading.Thread(target=self._listen, daemon=True)
            self._listener.start()
        with self._changed:
            self._wait_for(lambda: 0 in self._ended)
            self._raise_if_refused(0)

    def close(self) -> None:
        """End the connection. Readers that wait get an error."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._listener is not None:
            self._listener.join()
        self._channel.close()
        for window in self._windows:
            os.close(window)
        self._windows = ()

    def expect(self, spans: Sequence[FileSpan], *, whole: bool) -> None:
        """Announce the spans that will be read, in this order. They replace those that were announced before.

        If the same spans are being prefetched, that goes on.
        """
        spans = [span for span in spans if span.start < span.end]
        with self._changed:
            is_begun = self._prefetched == (spans, whole)
            self._prefetched = None
        if not is_begun:
            self._announce(spans, whole=whole)

    def open_files(self, files: Sequence[str]) -> None:
        """Nothing to open: the parent watches the files that it reads."""

    def prefetch(self, spans: Sequence[FileSpan], *, whole: bool) -> None:
        """Begin to read what `expect` will announce: as much as the window holds.

        A read before that is no sign that what comes before it is not needed, so it gets its bytes by a request of its
        own.
        """
        spans = [span for span in spans if span.start < span.end]
        with self._changed:
            is_begun = self._prefetched == (spans, whole)
        if not is_begun:
            self._announce(spans, whole=whole)
            with self._changed:
                self._prefetched = spans, whole

    def _announce(self, spans: list[FileSpan], *, whole: bool) -> None:
        self._forget()
        with self._changed:
            self._number += 1
            for span in spans:
                self._expected.add(span.file, span.start, span.end)
            number = self._number
        if spans:
            self._send(SpansExpected(number=number, spans=tuple(spans), whole=whole))

    def read(self, file: str, start: int, into: memoryview) -> None:
        """Fill `into` with the file's bytes from `start` on.

        The read that takes the last expected byte returns when all files have passed and were compared with their
        digests.

        Raises:
            SourceError: these bytes could not be had, or they are not the expected ones.
        """
        into = into.cast("B")
        place, end = start, start + len(into)
        while place < end:
            with self._changed:
                is_prefetched = self._prefetched is not None
                is_expected, until = (False, end) if is_prefetched else self._expected.run_at(file, place, end)
            part = into[place - start : until - start]
            done = self._copy_expected(file, place, part) if is_expected else self._read_at_once(file, place, part)
            place += done

    # --- what was expected -------------------------------------------------------------------------------------------

    def _copy_expected(self, file: str, place: int, into: memoryview) -> int:
        """Copy from the piece that holds this place, as far as it goes. 0 if the piece does not come any more."""
        with self._changed:
            piece = self._wait_for_piece(file, place)
            if piece is None:
                return 0
            piece.readers += 1
        try:
            end = min(piece.span.end, place + len(into))
            self._copy(self._windows[0], piece.start + place - piece.span.start, into[: end - place])
        finally:
            with self._changed:
                piece.readers -= 1
                piece.left -= self._expected.remove(file, place, end)
                released = self._used_up()
                is_last = not self._expected
                number = self._number
            self._release(released)
        if is_last:
            with self._changed:
                self._wait_for(lambda: number in self._ended or number != self._number)
                self._raise_if_refused(number)
        return end - place

    def _wait_for_piece(self, file: str, place: int) -> _Piece | None:
        while True:
            self._raise_if_refused(self._number)
            if not self._expected.has(file, place):
                return None  # another thread has read it, or it was dropped
            piece = next((one for one in self._pieces if one.holds(file, place)), None)
            if piece is not None:
                return piece
            if self._is_lost:
                raise _lost()
            if len(self._pieces) >= self._slots and not any(one.readers for one in self._pieces):
                # No one reads what fills the window, so this piece would never come: the oldest was skipped.
                oldest = self._pieces[0]
                self._expected.remove(oldest.span.file, oldest.span.start, oldest.span.end)
                oldest.left = 0
                self._release(self._used_up())
            else:
                self._changed.wait()

    def _used_up(self) -> list[_Piece]:
        """Take out the pieces that no one needs any more."""
        used_up = [one for one in self._pieces if one.left <= 0 and not one.readers]
        self._pieces = [one for one in self._pieces if one not in used_up]
        return used_up

    def _forget(self) -> None:
        with self._changed:
            self._expected, self._prefetched = _Ranges(), None
            for piece in self._pieces:
                piece.left = 0
            released = self._used_up()
            self._changed.notify_all()
        self._release(released)

    # --- at once -----------------------------------------------------------------------------------------------------

    def _read_at_once(self, file: str, place: int, into: memoryview, *, aside: bool = False) -> int:
        """Request bytes that were not announced, a few pieces at a time.

        They are taken in the order in which they arrive: one that waits for another would keep its slot.
        """
        spans = list(_on_grid(file, place, place + len(into)))[::-1]
        requested: dict[int, FileSpan] = {}
        try:
            while spans or requested:
                while spans and len(requested) < _REQUESTS_AT_ONCE:
                    span = spans.pop()
                    requested[self._request(span, aside=aside)] = span
                number = self._wait_for_any(requested)
                span = requested.pop(number)
                self._take(number, span, into[span.start - place : span.end - place])
        finally:
            self._abandon(requested)
        return len(into)

    def _abandon(self, requested: Collection[int]) -> None:
        """Release the slots of these requests, now or when they arrive: a read that fails must not keep them."""
        with self._changed:
            answers = [self._answers.pop(number) for number in requested if number in self._answers]
            self._abandoned |= set(requested) - {answer.number for answer in answers}
        for answer in answers:
            self._send(SlotReleased(number=answer.number, start=answer.start))

    def _request(self, span: FileSpan, *, aside: bool) -> int:
        with self._changed:
            self._at_once -= 1
            number = self._at_once
        self._send(BytesRequested(number=number, span=span, aside=aside))
        return number

    def _wait_for_any(self, requested: Collection[int]) -> int:
        with self._changed:
            self._wait_for(lambda: any(number in self._answers or number in self._ended for number in requested))
            return next(number for number in requested if number in self._answers or number in self._ended)

    def _take(self, number: int, span: FileSpan, into: memoryview) -> None:
        with self._changed:
            self._raise_if_refused(number)
            answer = self._answers.pop(number)
        try:
            self._copy(self._windows[1], answer.start + span.start - answer.span.start, into)
        finally:
            self._send(SlotReleased(number=number, start=answer.start))

    # --- the connection ----------------------------------------------------------------------------------------------

    def _receive_windows(self) -> None:
        count, descriptors, _, _ = socket.recv_fds(self._socket, _COUNT_BYTES, 2)
        if len(count) != _COUNT_BYTES or len(descriptors) != 2:  # noqa: PLR2004
            raise _lost()
        self._slots = int.from_bytes(count, "big")
        self._windows = tuple(descriptors)

    @staticmethod
    def _copy(window: int, start: int, into: memoryview) -> None:
        """Copy out of a window. A system call, unlike a mapping, lets other threads run meanwhile."""
        done = 0
        while done < len(into):
            count = os.preadv(window, [into[done:]], start + done)
            if not count:
                raise _lost()
            done += count

    def _listen(self) -> None:
        try:
            while True:
                self._receive(self._channel.receive(None))
        except Exception:  # noqa: BLE001 - whatever it is, no bytes come any more, and every reader has to know
            with self._changed:
                self._is_lost = True
                self._changed.notify_all()

    def _wait_for(self, is_so: Callable[[], bool]) -> None:
        """Wait, with `_changed` held."""
        self._changed.wait_for(lambda: self._is_lost or is_so())
        if not is_so():
            raise _lost()

    def _receive(self, message: object) -> None:
        released: list[_Piece] = []
        with self._changed:
            match message:
                case FeedEnded():
                    self._ended[message.number] = message.refusal
                case PieceArrived(number=number) if number in self._abandoned:
                    released = [_Piece(span=message.span, start=message.start, number=number, left=0)]
                case PieceArrived(number=number) if number < 0:
                    self._answers[number] = message
                case PieceArrived():
                    span, is_current = message.span, message.number == self._number
                    left = self._expected.count(span.file, span.start, span.end) if is_current else 0
                    self._pieces.append(_Piece(span=span, start=message.start, number=message.number, left=left))
                    released = self._used_up()
                case _:
                    raise GarbledError(type(message).__name__)
            self._changed.notify_all()
        self._release(released)

    def _release(self, pieces: list[_Piece]) -> None:
        for piece in pieces:
            self._send(SlotReleased(number=piece.number, start=piece.start))
        if pieces:
            with self._changed:
                self._changed.notify_all()

    def _send(self, message: object) -> None:
        try:
            with self._sending:
                self._channel.send(message)
        except OSError as error:
            raise _lost() from error

    def _raise_if_refused(self, number: int) -> None:
        if refusal := self._ended.get(number):
            raise SourceError(refusal.message, hint=refusal.hint)


class AsideFeed:
    """A `Feed` of a directory next to the base. Nothing of it is read ahead."""

    def __init__(self, client: FeedClient) -> None:
        self._client = client

    def expect(self, spans: Sequence[FileSpan], *, whole: bool) -> None:
        """Nothing to announce: the base is read ahead."""

    def open_files(self, files: Sequence[str]) -> None:
        """Nothing to open: the parent watches the files that it reads."""

    def prefetch(self, spans: Sequence[FileSpan], *, whole: bool) -> None:
        """Nothing to begin."""

    def read(self, file: str, start: int, into: memoryview) -> None:
        self._client.read_aside(file, start, into)


@dataclass(slots=True, eq=False)
class _Piece:
    """Bytes in the window. `left` counts those that are still expected, `readers` the threads that copy from it."""

    span: FileSpan
    start: int
    number: int
    left: int
    readers: int = 0

    def holds(self, file: str, place: int) -> bool:
        return self.span.file == file and self.span.start <= place < self.span.end


class _Ranges:
    """A set of bytes of files, as sorted ranges that do not touch."""

    def __init__(self) -> None:
        self._of: dict[str, list[tuple[int, int]]] = {}

    def __bool__(self) -> bool:
        return any(self._of.values())

    def add(self, file: str, start: int, end: int) -> None:
        ranges = self._of.setdefault(file, [])
        first = bisect.bisect_left(ranges, start, key=lambda one: one[1])
        last = bisect.bisect_right(ranges, end, key=lambda one: one[0])
        if first < last:
            start, end = min(start, ranges[first][0]), max(end, ranges[last - 1][1])
        ranges[first:last] = [(start, end)]

    def remove(self, file: str, start: int, end: int) -> int:
        """Remove a range. Returns how many of its bytes were in the set."""
        ranges = self._of.get(file, [])
        first, last = self._between(ranges, start, end)
        cut, removed = [], 0
        for low, high in ranges[first:last]:
            cut += [part for part in ((low, min(high, start)), (max(low, end), high)) if part[0] < part[1]]
            removed += min(high, end) - max(low, start)
        ranges[first:last] = cut
        return removed

    def count(self, file: str, start: int, end: int) -> int:
        """How many bytes of a range are in the set."""
        ranges = self._of.get(file, [])
        first, last = self._between(ranges, start, end)
        return sum(min(high, end) - max(low, start) for low, high in ranges[first:last])

    def has(self, file: str, place: int) -> bool:
        return self.count(file, place, place + 1) > 0

    def run_at(self, file: str, start: int, end: int) -> tuple[bool, int]:
        """Whether the byte at `start` is in the set, and up to which byte before `end` that is so."""
        ranges = self._of.get(file, [])
        first, last = self._between(ranges, start, end)
        if first == last:
            return False, end
        low, high = ranges[first]
        return (True, min(high, end)) if low <= start else (False, low)

    @staticmethod
    def _between(ranges: list[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
        """The ranges that have bytes between two places."""
        first = bisect.bisect_right(ranges, start, key=lambda one: one[1])
        return first, max(first, bisect.bisect_left(ranges, end, key=lambda one: one[0]))


def _on_grid(file: str, start: int, end: int) -> Iterator[FileSpan]:
    """A range in pieces that are cut where all pieces of the file are cut."""
    while start < end:
        until = min(end, start - start % PIECE_BYTES + PIECE_BYTES)
        yield FileSpan(file=file, start=start, end=until)
        start = until


def _lost() -> SourceError:
    return SourceError("the connection to the process that reads the base was lost", hint="run the gate again")
