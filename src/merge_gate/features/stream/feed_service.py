"""Reads the bases that are fed to the worker.

In: calls of the worker (parent_feed.py). Out: bytes of bases, with the digests of the files that passed whole.

1. The worker lists what it will need of a base: that is read ahead, in order, and hashed.          `SpansExpected`
2. It reads: what was read ahead, or other bytes.                                                   `BytesRequested`
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from merge_gate._internal.errors import SourceError
from merge_gate.features.stream.parent_feed import BytesRequested, SpansExpected
from merge_gate.features.stream.read_ahead import CONNECTIONS, BaseBytes, FedBase, LocalFiles, ReadAhead, Window
from merge_gate.files.feed import PIECE_BYTES
from merge_gate.records.files import FileIdentity, FileSpan
from merge_gate.worker.call_service import LINES, InvalidCallError, Service
from merge_gate.worker.memory import MemoryGroup
from merge_gate.worker.protocol import Group, Job

_WINDOW_SHARE = 8
_LEAST_SLOTS, _MOST_SLOTS = CONNECTIONS + 4, 32
"""The window takes an eighth of the free memory, between 192 and 512 MiB. It fills up while adapters are loaded."""


class Feeds:
    """The bases of one run that are fed: those with known `files` (by directory), and others as local directories.

    `on_complete` is called when all bytes of a base have passed, by a thread of the pass: with the directory, the
    identity of its files, and the digest of each weight file.
    """

    def __init__(
        self,
        files: Mapping[str, BaseBytes],
        on_complete: Callable[[str, tuple[FileIdentity, ...], Mapping[str, str]], None],
    ) -> None:
        self._files, self._on_complete = files, on_complete
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
            files = self._files.get(directory)
            files = files or LocalFiles(directory, group.files.weights, keep=not group.one_pass)
            identity = files.identity
            made = FedBase(files, lambda known: self._on_complete(directory, identity, known))
            # Several threads open bases. No lock: files on a mount that hangs must not keep others from theirs.
            self._bases.setdefault(directory, made)
        return self._bases[directory]

    def service(self, job: Job) -> FeedService | None:
        """What reads the bases of a job for one process; None if it reads them all itself."""
        if not any(group.fed for group in job.groups):
            return None
        return FeedService(lambda position: self.open(job.groups[position]))


class FeedService(Service):
    """Reads for one worker process. `open_base` gives the files of a group by its position in the job."""

    calls = (SpansExpected, BytesRequested)

    def __init__(self, open_base: Callable[[int], FedBase]) -> None:
        self._open_base = open_base
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
                if not ahead.is_due and (ahead.base, ahead.spans, ahead.whole) == (base, call.spans, call.whole):
                    ahead.is_due = call.is_due
                    return
                ahead.cancel()
            self._window = self._window or Window(_slots())
            self._ahead = ReadAhead(base, call.spans, self._window, whole=call.whole, is_due=call.is_due)
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


def _slots() -> int:
    room = (MemoryGroup().free_bytes() or 0) // _WINDOW_SHARE // PIECE_BYTES
    return min(max(room, _LEAST_SLOTS), _MOST_SLOTS)


def window_bytes() -> int:
    """The memory of the window that the bytes of a base pass through, and of the lines."""
    return (_slots() + LINES) * PIECE_BYTES
