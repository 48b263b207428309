"""The worker's calls of its parent process (call_service.py), in which features read files and create them.

In: calls of features. Out: their bytes, and open files. A call has a channel for itself until it is answered.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterable, Sequence

from merge_gate._internal.errors import SourceError
from merge_gate.worker.channel import CallChannel
from merge_gate.worker.encoding import GarbledError
from merge_gate.worker.protocol import Answer


class CallClient:
    """The channels to the parent. All methods may be called by several threads."""

    def __init__(self, channels: Iterable[CallChannel]) -> None:
        self._free: queue.SimpleQueue[CallChannel] = queue.SimpleQueue()
        for channel in channels:
            self._free.put(channel)
        self._owed: set[CallChannel] = set()  # an answer that no one took, because an earlier one was an error

    @classmethod
    def of(cls, descriptors: Sequence[int]) -> CallClient:
        """The client of the ends that came with the job."""
        return cls(CallChannel.of(*pair) for pair in zip(descriptors[::2], descriptors[1::2], strict=True))

    def call(self, message: object) -> tuple[Answer, list[int]]:
        """Returns the answer, and the open files that came with it.

        Raises:
            SourceError: the parent is gone, or refuses the call.
        """
        channel = self._free.get()
        try:
            self._ask(channel, message)
            return self._take_answer(channel), channel.taken_files()
        finally:
            self._free.put(channel)

    def fetch(self, calls: Iterable[tuple[object, memoryview]]) -> None:
        """Make calls, each with memory for its bytes. Each takes its time, so as many are made as channels are free.

        Raises:
            SourceError: as for `call`.
        """
        waiting = deque(calls)
        asked: deque[tuple[CallChannel, memoryview]] = deque()
        try:
            while waiting or asked:
                channel = self._channel(may_wait=not asked) if waiting else None
                if channel is not None:
                    message, into = waiting.popleft()
                    asked.append((channel, into))
                    self._ask(channel, message)
                else:
                    channel, into = asked[0]
                    self._take_answer(channel)
                    channel.take(into)
                    self._free.put(asked.popleft()[0])
        finally:
            for channel, _ in asked:
                self._free.put(channel)

    def _channel(self, *, may_wait: bool) -> CallChannel | None:
        try:
            return self._free.get(block=may_wait)
        except queue.Empty:
            return None

    def _ask(self, channel: CallChannel, message: object) -> None:
        try:
            if channel in self._owed:
                channel.receive()
            channel.send(message)
            self._owed.add(channel)
        except (EOFError, OSError, GarbledError) as error:
            raise _lost() from error

    def _take_answer(self, channel: CallChannel) -> Answer:
        self._owed.discard(channel)
        try:
            answer = channel.receive()
        except (EOFError, OSError, GarbledError) as error:
            raise _lost() from error
        if not isinstance(answer, Answer):
            raise _lost()
        if answer.refusal is not None:
            raise SourceError(answer.refusal.message, hint=answer.refusal.hint)
        return answer


def _lost() -> SourceError:
    return SourceError("the connection to the process that reads the base was lost", hint="run the gate again")
