"""The worker's calls of its parent process (call_service.py), in which features read files and create them.

In: calls of features. Out: their bytes, and open files. A call has a line for itself until it is answered.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterable, Sequence

from merge_gate._internal.errors import SourceError
from merge_gate.worker.channel import GarbledError, Line
from merge_gate.worker.protocol import Answer


class CallClient:
    """The lines to the parent. All methods may be called by several threads."""

    def __init__(self, lines: Iterable[Line]) -> None:
        self._free: queue.SimpleQueue[Line] = queue.SimpleQueue()
        for line in lines:
            self._free.put(line)
        self._owed: set[Line] = set()  # an answer that no one took, because an earlier one was an error

    @classmethod
    def of(cls, descriptors: Sequence[int]) -> CallClient:
        """The client of the ends that came with the job."""
        return cls(Line.of(*pair) for pair in zip(descriptors[::2], descriptors[1::2], strict=True))

    def call(self, message: object) -> tuple[Answer, list[int]]:
        """Returns the answer, and the open files that came with it.

        Raises:
            SourceError: the parent is gone, or refuses the call.
        """
        line = self._free.get()
        try:
            self._ask(line, message)
            return self._take_answer(line), line.taken_files()
        finally:
            self._free.put(line)

    def fetch(self, calls: Iterable[tuple[object, memoryview]]) -> None:
        """Make calls, each with memory for its bytes. Each takes its time, so there are as many as lines are free.

        Raises:
            SourceError: as for `call`.
        """
        waiting = deque(calls)
        asked: deque[tuple[Line, memoryview]] = deque()
        try:
            while waiting or asked:
                line = self._line(may_wait=not asked) if waiting else None
                if line is not None:
                    message, into = waiting.popleft()
                    asked.append((line, into))
                    self._ask(line, message)
                else:
                    line, into = asked[0]
                    self._take_answer(line)
                    line.take(into)
                    self._free.put(asked.popleft()[0])
        finally:
            for line, _ in asked:
                self._free.put(line)

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


def _lost() -> SourceError:
    return SourceError("the connection to the process that reads the base was lost", hint="run the gate again")
