"""Takes the tensors of merged models from the worker, which cannot write files.

In: messages of the worker, which is not trusted, over a connection of its own, and bytes in a window of shared memory.
Out: calls of a `Publisher`, with the bytes in the window. A worker that changes them meanwhile gains nothing: it could
have sent the other bytes. The digests of a model are those of its files, which are read again.

1. The worker plans a publication. The service answers the first plan with the window.
                                                                                 `PublicationPlanned`, `PlanTaken`
2. It puts a part of a tensor into the window. When the part was written, the place is free again.
                                                                                 `TensorPart`, `PartTaken`
3. It says which tensors count.                                                  `PublicationSent`
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import socket
import threading
from collections.abc import Collection, Iterator
from typing import Protocol

from merge_gate.records.files import StoredTensor
from merge_gate.worker.channel import Channel, GarbledError
from merge_gate.worker.protocol import (
    PartTaken,
    PlanTaken,
    PublicationPlanned,
    PublicationSent,
    TensorPart,
)

WINDOW_BYTES = 64 << 20

DRAIN_LIMIT_S = 120.0
"""How long the disk may take for the last window of a process."""

MOST_TENSORS = 1 << 20
"""A worker that plans more tensors is not the gate's own code."""


class Publisher(Protocol):
    """Gets the tensors of each task. Its methods are called by one thread, and raise nothing."""

    def planned(self, task: int, tensors: tuple[StoredTensor, ...]) -> None:
        """A merge begins, perhaps again: what was sent before does not count."""

    def part(self, task: int, name: str, offset: int, content: memoryview) -> None:
        """Bytes of a stored tensor. They are the worker's, and change after the call, or even during it."""

    def sent(self, message: PublicationSent) -> None:
        """All tensors of a task were sent."""


class PublishService:
    """Serves one worker process until `close`. `tasks` are those whose merges may be published."""

    def __init__(self, end: socket.socket, publisher: Publisher, tasks: Collection[int]) -> None:
        self._socket, self._channel = end, Channel(end)
        self._publisher, self._tasks = publisher, frozenset(tasks)
        self._window: mmap.mmap | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def drain(self) -> None:
        """Wait until everything that the process sent before its end is written."""
        self._thread.join(DRAIN_LIMIT_S)

    def close(self) -> None:
        """End the service. A disk that hangs keeps its thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(1.0)
        self._channel.close()

    def _serve(self) -> None:
        try:
            while True:
                self._answer(self._channel.receive(None))
        except (EOFError, OSError, GarbledError, _UnfitError):
            pass
        finally:  # the worker has to know
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _answer(self, message: object) -> None:
        match message:
            case PublicationPlanned(task=int(task), tensors=tuple(tensors)):
                self._check(task, tensors)
                if self._window is None:
                    self._open_window()
                self._publisher.planned(task, tensors)
                self._channel.send(PlanTaken(task=task))
            case TensorPart(task=int(task), name=str(name), offset=int(offset)):
                self._check(task, ())
                with self._content(message) as content:
                    self._publisher.part(task, name, offset, content)
                self._channel.send(PartTaken(start=message.start))
            case PublicationSent(task=int(task), tensors=tuple(tensors)):
                self._check(task, tensors)
                self._publisher.sent(message)
            case _:
                raise _UnfitError

    def _check(self, task: int, tensors: tuple[object, ...]) -> None:
        if task not in self._tasks or len(tensors) > MOST_TENSORS or not all(map(_is_tensor, tensors)):
            raise _UnfitError

    def _open_window(self) -> None:
        descriptor = os.memfd_create("merge-gate-published", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, WINDOW_BYTES)
            self._window = mmap.mmap(descriptor, WINDOW_BYTES, prot=mmap.PROT_READ)
            with contextlib.suppress(OSError):
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            socket.send_fds(self._socket, [WINDOW_BYTES.to_bytes(8, "big")], [descriptor])
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _content(self, part: TensorPart) -> Iterator[memoryview]:
        """The bytes of a part."""
        if self._window is None or not 0 <= part.start < part.start + part.size_bytes <= WINDOW_BYTES:
            raise _UnfitError
        with memoryview(self._window) as window, window[part.start : part.start + part.size_bytes] as content:
            yield content


class _UnfitError(Exception):
    """A message that the gate's own code in the worker never sends. The service ends."""


def _is_tensor(value: object) -> bool:
    match value:
        case StoredTensor(name=str(), dtype=str(), shape=tuple(shape)):
            return all(type(size) is int and size >= 0 for size in shape)
    return False
