"""Answers the calls of the worker, which has no network and no token, and can open no file for writing.

In: calls of the worker, which is not trusted, over several lines. Out: bytes of bases, with the digests of the files
that passed whole, and calls of a `Publisher`.

1. The worker lists what it will need of a base: that is read ahead, in order, and hashed.          `SpansExpected`
2. It reads: what was read ahead, or other bytes.                                                   `BytesRequested`
3. It plans a publication, and gets the files open, with their headers and sizes. It may write anything to them until
   it ends. Only then they are read, and compared with its checksums.     `PublicationPlanned`, `PublicationWritten`
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from merge_gate._internal.errors import GateError, SourceError
from merge_gate.features.stream.read_ahead import CONNECTIONS, BaseBytes, FedBase, LocalFiles, ReadAhead, Window
from merge_gate.files.feed import PIECE_BYTES
from merge_gate.records.files import FileIdentity, FileSpan, StoredTensor
from merge_gate.records.refusals import NotJudged
from merge_gate.worker.channel import GarbledError, Line
from merge_gate.worker.memory import MemoryGroup
from merge_gate.worker.protocol import (
    Answer,
    BytesRequested,
    Group,
    PublicationPlanned,
    PublicationWritten,
    Publisher,
    SpansExpected,
)

LINES = 4
"""Calls that are answered at a time."""

END_LIMIT_S = 1.0
"""How long the end of the service waits for a read or a disk."""

MOST_TENSORS = 1 << 20
"""A worker that lists more is not the gate's own code."""

MOST_DIMENSIONS, MOST_SIZE = 64, 1 << 48
"""A tensor with more of them takes long to multiply, in one call that no signal ends."""

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
        files: Mapping[str, BaseBytes] | None = None,
        on_complete: Callable[[str, tuple[FileIdentity, ...], Mapping[str, str]], None] = lambda *_: None,
    ) -> None:
        self._files, self._on_complete = files if files is not None else {}, on_complete
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


class CallService:
    """Serves one worker process until `close`.

    `open_base` gives the files of a group by its position in the job. `tasks` are those whose merges may be published.
    """

    def __init__(
        self,
        lines: Sequence[Line],
        open_base: Callable[[int], FedBase],
        publisher: Publisher | None = None,
        tasks: Collection[int] = (),
    ) -> None:
        self._lines, self._open_base = lines, open_base
        self._publisher, self._tasks = publisher, frozenset(tasks)
        self._expecting = threading.Lock()
        self._window: Window | None = None
        self._ahead: ReadAhead | None = None
        self._is_closed = False
        self._threads = [threading.Thread(target=self._serve, args=(line,), daemon=True) for line in lines]

    def start(self) -> None:
        """Begin to serve."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the service. A read or a disk that hangs keeps its thread."""
        for line in self._lines:
            line.hang_up()
        with self._expecting:
            self._is_closed = True
            if self._ahead is not None:
                self._ahead.cancel(SourceError("the base is not needed any more"))
        until = time.monotonic() + END_LIMIT_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _serve(self, line: Line) -> None:
        try:
            memory = memoryview(mmap.mmap(line.window, PIECE_BYTES))
            while True:
                refusal, files = self._answered(line.receive(), memory)
                try:
                    line.send(Answer(refusal=refusal, files=len(files)), files)
                finally:
                    for descriptor in files:
                        os.close(descriptor)
        except (EOFError, OSError, GarbledError, _UnfitError):
            pass
        finally:  # the worker has to know
            for one in self._lines:
                one.hang_up()

    def _answered(self, call: object, memory: memoryview) -> tuple[NotJudged | None, tuple[int, ...]]:
        """Carry out a call. Returns why that was not possible, and the open files that the worker gets."""
        try:
            return None, self._carried_out(call, memory)
        except _UnfitError:
            raise
        except GateError as error:
            return NotJudged(message=error.message, hint=error.hint), ()
        except Exception as error:  # noqa: BLE001 - the worker gets it
            why = f"{type(error).__name__}: {str(error)[:200]}"
            return NotJudged(message=f"a call of the worker could not be answered: {why}"), ()

    def _carried_out(self, call: object, memory: memoryview) -> tuple[int, ...]:
        match call:
            case SpansExpected():
                self._expect(call)
            case BytesRequested(group=group, span=span):
                base = self._open_base(group)
                if not _is_in(span, base):
                    raise _UnfitError
                self._read(base, span, memory[: span.end - span.start])
            case PublicationPlanned(task=int(task), tensors=tuple(tensors)):
                return self._publisher_of(task, tensors, _is_tensor).planned(task, tensors)
            case PublicationWritten(
                task=int(task),
                checksums=tuple(checksums),
                settings=str(),
                refusal=None | NotJudged(message=str(), hint=str()),
            ):
                self._publisher_of(task, checksums, _is_checksum).written(call)
            case _:
                raise _UnfitError
        return ()

    def _expect(self, call: SpansExpected) -> None:
        base = self._open_base(call.group)
        if not all(_is_in(span, base) for span in call.spans):
            raise _UnfitError
        with self._expecting:
            if self._is_closed:
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

    def _publisher_of(self, task: int, listed: Sequence[object], is_one: Callable[[object], bool]) -> Publisher:
        is_fit = task in self._tasks and len(listed) <= MOST_TENSORS and all(map(is_one, listed))
        if self._publisher is None or not is_fit:
            raise _UnfitError
        return self._publisher


class _UnfitError(Exception):
    """A call that the gate's own code in the worker never makes. The service ends."""


def _is_in(span: FileSpan, base: FedBase) -> bool:
    """Whether these are bytes of the base's files. A worker may ask for others, which this process can read."""
    return 0 <= span.start < span.end <= base.files.sizes.get(span.file, 0)


def _is_tensor(value: object) -> bool:
    match value:
        case StoredTensor(name=str(), dtype=str(), shape=tuple(shape)):
            return len(shape) <= MOST_DIMENSIONS and all(type(size) is int and 0 <= size < MOST_SIZE for size in shape)
    return False


def _is_checksum(value: object) -> bool:
    match value:
        case (str(), int()):
            return True
    return False


def _slots() -> int:
    room = (MemoryGroup().free_bytes() or 0) // _WINDOW_SHARE // PIECE_BYTES
    return min(max(room, _LEAST_SLOTS), _MOST_SLOTS)


def window_bytes() -> int:
    """The memory of the window that the bytes of a base pass through, and of the lines."""
    return (_slots() + LINES) * PIECE_BYTES
