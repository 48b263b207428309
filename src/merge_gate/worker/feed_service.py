"""Reads the weight files of bases for the worker, which has no network and no token.

In: requests of the worker, which is not trusted, over a connection of its own. Out: bytes in two windows of shared
memory, and the digests of the files that passed whole.

1. The worker names a group. It gets the windows, once.                          `FeedOpened`
2. It lists what it will need: that is read ahead, in order, and hashed.         `SpansExpected`
3. It may ask for other bytes: these have slots of their own, so that they never wait for the others.
                                                                                 `BytesRequested`
4. It copies the bytes out of a slot, and releases it.                           `SlotReleased`
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Callable, Mapping
from functools import partial

from merge_gate.errors import GateError
from merge_gate.records.files import FileIdentity
from merge_gate.records.refusals import NotJudged
from merge_gate.sources.digests import Digests, widened
from merge_gate.sources.feed import PIECE_BYTES, FileSpan
from merge_gate.sources.local_files import LocalFiles
from merge_gate.sources.read_ahead import BaseBytes, ReadAhead, plan
from merge_gate.sources.window import Window, WindowSlot
from merge_gate.worker.channel import Channel, GarbledError
from merge_gate.worker.memory import MemoryGroup
from merge_gate.worker.protocol import (
    BytesRequested,
    FeedEnded,
    FeedOpened,
    Group,
    PieceArrived,
    SlotReleased,
    SpansExpected,
)

CONNECTIONS = 8
"""Pieces that are read at a time: over a network, the rate grows with them."""

_WINDOW_SHARE = 8
_LEAST_SLOTS, _MOST_SLOTS = CONNECTIONS + 4, 32
"""The window takes an eighth of the free memory, between 192 and 512 MiB. It fills up while adapters are loaded."""

MOST_SPANS, MOST_REQUESTS = 1 << 20, 1 << 12
"""A worker that lists more spans, or has more requests open, is not the gate's own code."""

_AT_ONCE = 4
"""Pieces that are read at a time because the worker waits for them."""


class FedBase:
    """The files of one base, and what passed of them. `digests` outlives the processes that read them."""

    def __init__(
        self,
        files: BaseBytes,
        on_complete: Callable[[Mapping[str, str]], None] = lambda _: None,
        on_piece: Callable[[str, int, memoryview], None] = lambda *_: None,
    ) -> None:
        self.files, self.on_complete, self.on_piece = files, on_complete, on_piece
        self.digests = Digests(files.sizes, files.sha256)

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
        self.digests.compare(file, first, chunks)
        into[:] = chunks[start - first : start - first + len(into)]


class Feeds:
    """The bases of one run that are fed: those with known `files` (by directory), and others as local directories.

    `on_complete` is called when all bytes of a base have passed, by a thread of the service: with the directory, the
    identity of its files, and the digest of each weight file. `on_piece` is called for each piece that is read ahead,
    by a thread of the service: with the directory, the file, the place in it, and the bytes, which change afterwards.
    """

    def __init__(
        self,
        files: Mapping[str, BaseBytes] | None = None,
        on_complete: Callable[[str, tuple[FileIdentity, ...], Mapping[str, str]], None] = lambda *_: None,
        on_piece: Callable[[str, str, int, memoryview], None] = lambda *_: None,
    ) -> None:
        self._files, self._on_complete, self._on_piece = files if files is not None else {}, on_complete, on_piece
        self._bases: dict[str, FedBase] = {}

    def open(self, group: Group) -> FedBase:
        """The files of a group's base.

        Raises:
            SourceError: they cannot be read.
        """
        directory = group.directory
        if directory not in self._bases:
            if directory not in self._files and group.files.is_streamed:
                raise AssertionError(f"{directory} holds stubs, and nothing has its bytes")
            files = self._files.get(directory) or _local(group)
            self._bases[directory] = FedBase(
                files,
                lambda known: self._on_complete(directory, files.identity, known),
                partial(self._on_piece, directory),
            )
        return self._bases[directory]


def _local(group: Group) -> LocalFiles:
    return LocalFiles(group.directory, group.files.weights, keep=not group.one_pass)


class FeedService:
    """Serves one worker process until `close`. `open_base` gives the files of a group by its position in the job."""

    def __init__(self, end: socket.socket, open_base: Callable[[int], FedBase], *, poison: bool = False) -> None:
        self._socket, self._channel = end, Channel(end)
        self._open_base = open_base
        self._sending = threading.Lock()
        self._poison = poison
        self._windows: tuple[Window, Window] | None = None
        self._base: FedBase | None = None
        self._aside: FedBase | None = None
        self._ahead: ReadAhead | None = None
        self._lent: dict[tuple[bool, int], WindowSlot] = {}
        self._requests: queue.SimpleQueue[tuple[FedBase, BytesRequested] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._serve, daemon=True)]

    def start(self) -> None:
        """Begin to serve."""
        self._threads[0].start()

    def close(self) -> None:
        """End the service. A read that hangs keeps its thread, and no one waits for it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(1.0)
        if self._ahead is not None:
            self._ahead.cancel()
        for window in self._windows or ():
            window.close()
        for _ in range(_AT_ONCE):
            self._requests.put(None)
        self._channel.close()

    # --- requests --------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while True:
                self._answer(self._channel.receive(None))
        except (EOFError, OSError, GarbledError, _UnfitError):
            pass
        finally:  # the worker has to know
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _answer(self, request: object) -> None:
        match request:
            case FeedOpened(group=int(group), aside=bool(aside)):
                self._open(group, aside=aside)
            case SpansExpected(number=int(number), spans=tuple(spans), whole=bool(whole)) if number > 0:
                if len(spans) > MOST_SPANS:
                    raise _UnfitError
                self._read_ahead(number, tuple(self._checked(span, self._opened()) for span in spans), whole=whole)
            case BytesRequested(number=int(number), span=span, aside=bool(aside)) if number < 0:
                base = self._opened(aside=aside)
                if self._requests.qsize() > MOST_REQUESTS or not _is_in_one_piece(self._checked(span, base)):
                    raise _UnfitError
                self._requests.put((base, request))
            case SlotReleased(number=int(number), start=int(start)):
                self._release(number, start)
            case _:
                raise _UnfitError

    def _checked(self, span: object, base: FedBase) -> FileSpan:
        """A span of one of the base's files. The worker may run code of the base, and ask for anything."""
        match span:
            case FileSpan(file=str(file), start=int(start), end=int(end)):
                if 0 <= start < end <= base.files.sizes.get(file, 0):
                    return span
        raise _UnfitError

    def _opened(self, *, aside: bool = False) -> FedBase:
        base = self._aside if aside else self._base
        if base is None:
            raise _UnfitError
        return base

    def _open(self, group: int, *, aside: bool) -> None:
        if self._windows is None:
            self._windows = (
                Window(PIECE_BYTES, _slots(), poison=self._poison),
                Window(PIECE_BYTES, _AT_ONCE, poison=self._poison),
            )
            count = self._windows[0].slots.to_bytes(4, "big")
            socket.send_fds(self._socket, [count], [window.descriptor for window in self._windows])
            at_once = self._windows[1]
            self._threads += [
                threading.Thread(target=self._read_at_once, args=(at_once,), daemon=True) for _ in range(_AT_ONCE)
            ]
            for thread in self._threads[1:]:
                thread.start()
        if self._ahead is not None and not aside:
            self._ahead.cancel()
            self._ahead = None
        try:
            opened = self._open_base(group)
            self._base, self._aside = (self._base, opened) if aside else (opened, self._aside)
        except GateError as error:
            self._send(FeedEnded(number=0, refusal=NotJudged(message=error.message, hint=error.hint)))
        else:
            self._send(FeedEnded(number=0))

    def _release(self, number: int, start: int) -> None:
        slot = self._lent.pop((number < 0, start), None)
        if slot is None or self._windows is None:
            raise _UnfitError
        self._windows[number < 0].release(slot)

    # --- read ahead ------------------------------------------------------------------------------------------------

    def _read_ahead(self, number: int, spans: tuple[FileSpan, ...], *, whole: bool) -> None:
        if self._ahead is not None:
            self._ahead.cancel()
        base = self._opened()
        assert self._windows is not None  # noqa: S101 - they were made when the base was opened
        base.digests.begin()
        pieces = plan(spans, base.files.sizes, base.digests.known if whole else base.files.sizes)
        receiver = _Receiver(self, number, base, self._windows[0])
        self._ahead = ReadAhead(base.files, pieces, self._windows[0], base.digests, receiver, connections=CONNECTIONS)
        self._ahead.start()

    def lend(self, number: int, span: FileSpan, slot: WindowSlot) -> None:
        """Hand a filled slot to the worker."""
        self._lent[number < 0, slot.start] = slot
        self._send(PieceArrived(number=number, span=span, start=slot.start))

    def finish(self, number: int, error: Exception | None) -> None:
        """Tell the worker that a request is done, or why it cannot be."""
        self._send(FeedEnded(number=number, refusal=_refusal(error) if error is not None else None))

    def _send(self, message: object) -> None:
        with contextlib.suppress(OSError), self._sending:  # the worker is gone
            self._channel.send(message)

    # --- at once ---------------------------------------------------------------------------------------------------

    def _read_at_once(self, window: Window) -> None:
        for base, request in iter(self._requests.get, None):
            files, span = base.files, request.span
            if span.file in files.sha256:
                start, end = widened(span.start, span.end, files.sizes[span.file])
                span = FileSpan(file=span.file, start=start, end=end)
            slot = window.acquire(span.end - span.start)
            if slot is not None:  # else the service is closed
                self._lend_at_once(base, request.number, span, slot, window)

    def _lend_at_once(self, base: FedBase, number: int, span: FileSpan, slot: WindowSlot, window: Window) -> None:
        try:
            base.files.read(span.file, span.start, window.view(slot))
            base.digests.compare(span.file, span.start, window.view(slot))
        except Exception as error:  # noqa: BLE001 - the worker gets it
            window.release(slot)
            self.finish(number, error)
        else:
            self.lend(number, span, slot)


class _UnfitError(Exception):
    """A request that the gate's own code in the worker never makes. The service ends."""


class _Receiver:
    """Passes the pieces of one request on."""

    def __init__(self, service: FeedService, number: int, base: FedBase, window: Window) -> None:
        self._service, self._number, self._base, self._window = service, number, base, window

    def deliver(self, span: FileSpan, slot: WindowSlot) -> None:
        with contextlib.suppress(Exception):  # it is for publications only, which read again what they did not get
            self._base.on_piece(span.file, span.start, self._window.view(slot))
        self._service.lend(self._number, span, slot)

    def finish(self, error: Exception | None) -> None:
        if self._base.digests.are_complete:
            self._base.on_complete(self._base.digests.known)
        self._service.finish(self._number, error)


def _slots() -> int:
    room = (MemoryGroup().free_bytes() or 0) // _WINDOW_SHARE // PIECE_BYTES
    return min(max(room, _LEAST_SLOTS), _MOST_SLOTS)


def window_bytes() -> int:
    """The memory of the window that the bytes of a base pass through."""
    return (_slots() + _AT_ONCE) * PIECE_BYTES


def _is_in_one_piece(span: FileSpan) -> bool:
    return span.start // PIECE_BYTES == (span.end - 1) // PIECE_BYTES


def _refusal(error: Exception) -> NotJudged:
    if isinstance(error, GateError):
        return NotJudged(message=error.message, hint=error.hint)
    return NotJudged(message=f"the base's bytes could not be read: {type(error).__name__}: {str(error)[:200]}")
