"""The worker's side of publishing: sends the tensors of merged models to the parent process, which writes the files.

In: stored tensors, as bytes. Out: messages on a connection of its own, and the bytes in a window of shared memory. Each
part of the window is used again after the parent has copied it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections import deque
from collections.abc import Sequence

from merge_gate.errors import EngineError
from merge_gate.records.files import StoredTensor
from merge_gate.records.refusals import NotJudged
from merge_gate.worker.channel import Channel
from merge_gate.worker.protocol import (
    PartTaken,
    PlanTaken,
    PublicationPlanned,
    PublicationSent,
    TensorPart,
)

PART_BYTES = 4 << 20
"""The most bytes of a message. The window has room for several: one is filled while others are written."""

_SIZE_BYTES = 8


class PublishClient:
    """The connection to the parent. All methods may be called by several threads."""

    def __init__(self, end: socket.socket) -> None:
        self._socket, self._channel = end, Channel(end)
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._window: int | None = None
        self._free: deque[int] = deque()
        self._in_use: dict[int, int] = {}  # start of a part: its task
        self._ready: set[int] = set()  # tasks whose plan the parent has taken
        self._is_lost = False

    def plan(self, task: int, tensors: Sequence[StoredTensor]) -> None:
        """Begin to send the tensors of a task, perhaps again. Returns when the parent is ready.

        Raises:
            EngineError: the parent is gone. The other methods raise it, too.
        """
        with self._changed:
            self._ready.discard(task)
        with self._sending:
            self._send(PublicationPlanned(task=task, tensors=tuple(tensors)))
            if self._window is None:
                self._receive_window()
        with self._changed:
            self._changed.wait_for(lambda: self._is_lost or task in self._ready)
            if task not in self._ready:
                raise _lost()

    def send(self, task: int, name: str, offset: int, values: memoryview) -> None:
        """Send bytes of a stored tensor, from `offset` of the tensor on. `values` may be changed afterwards."""
        values = values.cast("B")
        for done in range(0, len(values), PART_BYTES):
            part = values[done : done + PART_BYTES]
            start = self._acquire(task)
            self._write(start, part)
            with self._sending:
                self._send(TensorPart(task=task, name=name, offset=offset + done, start=start, size_bytes=len(part)))

    def finish(self, task: int, tensors: Sequence[StoredTensor], refusal: NotJudged | None) -> None:
        """Wait until the parent has taken all parts of the task, and say which tensors count."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_lost or task not in self._in_use.values())
        with self._sending:
            self._send(PublicationSent(task=task, tensors=tuple(tensors), refusal=refusal))

    def _send(self, message: object) -> None:
        try:
            if self._is_lost:
                raise _lost()
            self._channel.send(message)
        except OSError as error:
            raise _lost() from error

    def _receive_window(self) -> None:
        try:
            size, descriptors, _, _ = socket.recv_fds(self._socket, _SIZE_BYTES, 1)
        except OSError as error:
            raise _lost() from error
        if len(size) != _SIZE_BYTES or len(descriptors) != 1:
            raise _lost()
        self._free.extend(range(0, int.from_bytes(size, "big") - PART_BYTES + 1, PART_BYTES))
        self._window = descriptors[0]
        threading.Thread(target=self._listen, daemon=True).start()

    def _acquire(self, task: int) -> int:
        with self._changed:
            self._changed.wait_for(lambda: self._is_lost or self._free)
            if self._is_lost:
                raise _lost()
            start = self._free.popleft()
            self._in_use[start] = task
            return start

    def _write(self, start: int, part: memoryview) -> None:
        """Copy into the window. A system call, unlike a mapping, lets other threads run meanwhile."""
        assert self._window is not None  # noqa: S101 - it has free parts
        done = 0
        while done < len(part):
            done += os.pwrite(self._window, part[done:], start + done)

    def _listen(self) -> None:
        with contextlib.suppress(Exception):  # whatever it is, no part is taken any more
            while isinstance(message := self._channel.receive(None), PartTaken | PlanTaken):
                with self._changed:
                    if isinstance(message, PlanTaken):
                        self._ready.add(message.task)
                    elif self._in_use.pop(message.start, None) is not None:
                        self._free.append(message.start)
                    self._changed.notify_all()
        with self._changed:  # every sender has to know
            self._is_lost = True
            self._changed.notify_all()

    def close(self) -> None:
        """End the connection. Threads that send get an error."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._channel.close()
        if self._window is not None:
            os.close(self._window)
            self._window = None


def _lost() -> EngineError:
    return EngineError("the connection to the process that writes the merged model was lost", hint="run the gate again")
