"""Reads the bases that are fed to the worker.

In: calls of the worker (parent_feed.py). Out: bytes of bases, with the digests of the files that passed whole.

1. The worker lists what it will need of a base: that is read ahead, in order, and hashed.          `SpansExpected`
2. It reads: what was read ahead, or other bytes.                                                   `BytesRequested`
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from merge_gate._internal.errors import SourceError
from merge_gate.features.stream.read_ahead import CONNECTIONS, FedBase, ReadAhead, Window
from merge_gate.files.feed import PIECE_BYTES
from merge_gate.records.files import FileSpan
from merge_gate.worker.call_service import CALL_CHANNELS, InvalidCallError, Service
from merge_gate.worker.memory import MemoryGroup
from merge_gate.worker.parent_feed import BytesRequested, SpansExpected

_WINDOW_SHARE = 8
_LEAST_SLOTS, _MOST_SLOTS = CONNECTIONS + 4, 32
"""The window takes an eighth of the free memory, between 192 and 512 MiB. It fills up while adapters are loaded."""


class FeedService(Service):
    """Reads for one worker process, through a window of `slots` pieces.

    `open_base` gives the files of a group by its position in the job.
    """

    calls = (SpansExpected, BytesRequested)

    def __init__(self, open_base: Callable[[int], FedBase], slots: int) -> None:
        self._open_base, self._slots = open_base, slots
        self._expecting = threading.Lock()
        self._window: Window | None = None
        self._ahead: ReadAhead | None = None
        self._is_canceled = False

    def answer(self, call: SpansExpected | BytesRequested, memory: memoryview) -> tuple[int, ...]:
        base = self._open_base(call.group)
        if isinstance(call, SpansExpected):
            self._expect(base, call)
        elif _is_in(call.span, base):
            self._read(base, call.span, memory[: call.span.end - call.span.start])
        else:
            raise InvalidCallError
        return ()

    def cancel(self) -> None:
        with self._expecting:
            self._is_canceled = True
            if self._ahead is not None:
                self._ahead.cancel(SourceError("the base is not needed any more"))

    def _expect(self, base: FedBase, call: SpansExpected) -> None:
        if not all(_is_in(span, base) for span in call.spans):
            raise InvalidCallError
        with self._expecting:
            if self._is_canceled:
                return
            ahead = self._ahead
            if ahead is not None:
                if not ahead.needed_now and (ahead.base, ahead.spans, ahead.whole) == (base, call.spans, call.whole):
                    ahead.needed_now = call.needed_now
                    return
                ahead.cancel()
            self._window = self._window or Window(self._slots)
            self._ahead = ReadAhead(base, call.spans, self._window, whole=call.whole, needed_now=call.needed_now)
            if call.spans:
                self._ahead.start()

    def _read(self, base: FedBase, span: FileSpan, into: memoryview) -> None:
        ahead = self._ahead
        if ahead is None or ahead.base is not base:
            base.read(span.file, span.start, into)
            return
        done = 0
        while done < len(into):
            done += ahead.read(span.file, span.start + done, into[done:])


def _is_in(span: FileSpan, base: FedBase) -> bool:
    """Whether these are bytes of the base's files. A worker may ask for others, which this process can read."""
    return 0 <= span.start < span.end <= base.files.sizes.get(span.file, 0)


def slots(free_bytes: int | None) -> int:
    return min(max((free_bytes or 0) // _WINDOW_SHARE // PIECE_BYTES, _LEAST_SLOTS), _MOST_SLOTS)


def window_bytes() -> int:
    """The memory that the bytes of a base pass through: the window, and a piece for each channel of calls."""
    return (slots(MemoryGroup().free_bytes()) + CALL_CHANNELS) * PIECE_BYTES
