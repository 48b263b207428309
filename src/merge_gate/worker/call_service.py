"""Answers the calls of the worker, which has no network and no token, and can open no file for writing.

In: calls of the worker, which is not trusted, over several channels. Out: what the services of a run's features answer.
"""

from __future__ import annotations

import functools
import mmap
import operator
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

from merge_gate._internal.errors import GateError
from merge_gate.files.feed import PIECE_BYTES
from merge_gate.records.refusals import NotJudged
from merge_gate.worker.channel import CallChannel, limits_of
from merge_gate.worker.encoding import GarbledError
from merge_gate.worker.protocol import Answer, Job

CALL_CHANNELS = 4
"""Calls that are answered at a time."""

END_TIMEOUT_S = 1.0
"""How long the end of the service waits for a read or a disk."""


class InvalidCallError(Exception):
    """The worker sent an invalid call; it may be compromised. No further call is answered."""


class Service:
    """Carries out the calls of one worker process for a feature. Several threads call it.

    `calls` are the records of its calls.
    """

    calls: tuple[type, ...]

    def answer(self, call: Any, memory: memoryview) -> Sequence[int]:
        """Carry out a call. Its bytes go to `memory`. Returns open files for the worker, which the caller closes.

        Raises:
            InvalidCallError: the gate's own code in the worker never makes this call. The worker gets any other error.
        """
        raise NotImplementedError

    def cancel(self) -> None:
        """The process has ended, so no call may wait any more."""

    def end(self) -> None:
        """All calls have ended, except those that wait for a disk that hangs."""


class CallService:
    """Answers the calls of one worker process from `start` until `close`."""

    def __init__(self, services: Sequence[Service], job: Job | None = None) -> None:
        self._services = services
        self._answers = {call: service.answer for service in services for call in service.calls}
        calls = functools.reduce(operator.or_, self._answers)
        pairs = [CallChannel.pair(calls, limits_of(job)) for _ in range(CALL_CHANNELS)]
        self.channels, self._of_worker = zip(*pairs, strict=True)
        self._threads = [threading.Thread(target=self._serve, args=(each,), daemon=True) for each in self.channels]

    def start(self) -> list[int]:
        """Begin to answer. Returns the worker's ends of the channels, which the caller closes."""
        for thread in self._threads:
            thread.start()
        return [descriptor for channel in self._of_worker for descriptor in channel.detached()]

    def close(self) -> None:
        """End the service. A read or a disk that hangs keeps its thread."""
        self._hang_up()
        for service in self._services:
            service.cancel()
        until = time.monotonic() + END_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        for service in self._services:
            service.end()
        for channel in self.channels:
            channel.close()

    def _hang_up(self) -> None:
        for channel in self.channels:
            channel.hang_up()

    def _serve(self, channel: CallChannel) -> None:
        try:
            memory = memoryview(mmap.mmap(channel.window, PIECE_BYTES))
            while True:
                refusal, files = self._answered(channel.receive(), memory)
                try:
                    channel.send(Answer(refusal=refusal, files=len(files)), files)
                finally:
                    for descriptor in files:
                        os.close(descriptor)
        except (EOFError, OSError, GarbledError, InvalidCallError):
            pass
        finally:  # the worker has to know
            self._hang_up()

    def _answered(self, call: object, memory: memoryview) -> tuple[NotJudged | None, Sequence[int]]:
        """Carry out a call. Returns why that was not possible, and the open files that the worker gets."""
        try:
            return None, self._answers[type(call)](call, memory)
        except InvalidCallError:
            raise
        except GateError as error:
            return NotJudged(message=error.message, hint=error.hint), ()
        except Exception as error:  # noqa: BLE001 - the worker gets it
            why = f"{type(error).__name__}: {str(error)[:200]}"
            return NotJudged(message=f"a call of the worker could not be answered: {why}"), ()
