"""The worker's calls of its parent process (call_service.py), which alone reads bases from afar and creates files.

In: spans that will be read, reads, and plans of merged models. Out: the bytes of a base, and open files. A call has a
line for itself until it is answered.
"""

from __future__ import annotations

import os
import queue
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from merge_gate._internal.errors import SourceError
from merge_gate.features.publish.planned_files import PlannedFiles
from merge_gate.files.feed import PIECE_BYTES, Feed
from merge_gate.records.files import FileSpan, StoredTensor
from merge_gate.records.refusals import NotJudged
from merge_gate.worker.channel import GarbledError, Line
from merge_gate.worker.memory import MORE_FILES
from merge_gate.worker.protocol import (
    Answer,
    BytesRequested,
    PublicationPlanned,
    PublicationWritten,
    SpansExpected,
)


class CallClient:
    """The lines to the parent. All methods may be called by several threads."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self._free: queue.SimpleQueue[Line] = queue.SimpleQueue()
        for line in lines:
            self._free.put(line)
        self._owed: set[Line] = set()  # an answer that no one took, because an earlier one was an error

    # --- bases -----------------------------------------------------------------------------------------------------

    def feed(self, group: int) -> ParentFeed:
        """Read the base of this group of the job from now on.

        Raises:
            SourceError: the parent cannot open its files.
        """
        self.expect(SpansExpected(group=group, spans=(), whole=False))
        return ParentFeed(self, group)

    def expect(self, message: SpansExpected) -> None:
        """Let the parent read ahead."""
        self._call(message)

    def read(self, group: int, file: str, start: int, into: memoryview) -> None:
        """Fill `into`. Of a long read, there are as many calls at a time as lines are free: each takes its time."""
        spans = deque(_on_grid(file, start, start + len(into)))
        asked: deque[tuple[Line, FileSpan]] = deque()
        try:
            while spans or asked:
                line = self._line(may_wait=not asked) if spans else None
                if line is not None:
                    asked.append((line, spans.popleft()))
                    self._ask(line, BytesRequested(group=group, span=asked[-1][1]))
                else:
                    line, span = asked[0]
                    self._take_answer(line)
                    line.take(into[span.start - start : span.end - start])
                    self._free.put(asked.popleft()[0])
        finally:
            for line, _ in asked:
                self._free.put(line)

    # --- models: the connection of a publication's sinks -------------------------------------------------------------

    def plan(self, task: int, tensors: Sequence[StoredTensor]) -> PlannedFiles:
        """Begin to write the tensors of a task, perhaps again. Returns the files of its model.

        Raises:
            SourceError: the parent is gone, as for the other methods, or the model cannot be published.
        """
        return PlannedFiles(self._call(PublicationPlanned(task=task, tensors=tuple(tensors))))

    def finish(self, task: int, checksums: Mapping[str, int], settings: str, refusal: NotJudged | None) -> None:
        """Say which tensors were written."""
        self._call(
            PublicationWritten(task=task, checksums=tuple(checksums.items()), settings=settings, refusal=refusal)
        )

    # --- calls -----------------------------------------------------------------------------------------------------

    def _call(self, message: object) -> list[int]:
        """Returns the open files that come with the answer."""
        line = self._free.get()
        try:
            self._ask(line, message)
            answer, files = self._take_answer(line), line.taken_files()
        finally:
            self._free.put(line)
        if len(files) != answer.files:
            for descriptor in files:
                os.close(descriptor)
            raise SourceError(f"{answer.files:,} more files cannot be open in this process", hint=MORE_FILES)
        return files

    def _line(self, *, may_wait: bool) -> Line | None:
        try:
            return self._free.get(block=may_wait)
        except queue.Empty:
            return None

    def _ask(self, line: Line, message: object) -> None:
        try:
            if line in self._owed:
                line.receive()
            line.send(message)
            self._owed.add(line)
        except (EOFError, OSError, GarbledError) as error:
            raise _lost() from error

    def _take_answer(self, line: Line) -> Answer:
        self._owed.discard(line)
        try:
            answer = line.receive()
        except (EOFError, OSError, GarbledError) as error:
            raise _lost() from error
        if not isinstance(answer, Answer):
            raise _lost()
        if answer.refusal is not None:
            raise SourceError(answer.refusal.message, hint=answer.refusal.hint)
        return answer


class ParentFeed(Feed):
    """Reads a group's base. With `is_aside`, nothing of it is read ahead: that is for another base."""

    def __init__(self, client: CallClient, group: int, *, is_aside: bool = False) -> None:
        self._client, self._group, self._is_aside = client, group, is_aside

    def expect(self, spans: Sequence[FileSpan], *, whole: bool, is_due: bool = True) -> None:
        if not self._is_aside:
            spans = tuple(span for span in spans if span.start < span.end)
            self._client.expect(SpansExpected(group=self._group, spans=spans, whole=whole, is_due=is_due))

    def read(self, file: str, start: int, into: memoryview) -> None:
        self._client.read(self._group, file, start, into.cast("B"))


def _on_grid(file: str, start: int, end: int) -> Iterator[FileSpan]:
    """A range in pieces that are cut where all pieces of the file are cut."""
    while start < end:
        until = min(end, start - start % PIECE_BYTES + PIECE_BYTES)
        yield FileSpan(file=file, start=start, end=until)
        start = until


def _lost() -> SourceError:
    return SourceError("the connection to the process that reads the base was lost", hint="run the gate again")
