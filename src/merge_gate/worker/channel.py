"""Sends and receives whole messages between the run and its worker, over a pair of sockets.

A base's own code may write to the worker's end. So only records are unpickled: a pickle that names any other class, or
declares too large a size, is refused.
"""

from __future__ import annotations

import io
import pickle
import select
import socket
import struct
import threading
import time

from merge_gate.records import comparison, config, files, measured, refusals, report, terms
from merge_gate.sources.feed import FileSpan
from merge_gate.worker import protocol

_LENGTH = struct.Struct("!Q")
_CHUNK_BYTES = 1 << 20

MAX_BYTES = 1 << 28
"""Messages that declare a larger size are refused."""

_RECORD_CLASSES = {
    (cls.__module__, cls.__qualname__): cls
    for module in (terms, config, files, measured, comparison, refusals, report, protocol)
    for cls in vars(module).values()
    if isinstance(cls, type) and cls.__module__ == module.__name__ and not issubclass(cls, Exception)
} | {(FileSpan.__module__, FileSpan.__qualname__): FileSpan}


class GarbledError(Exception):
    """The received bytes are not a message."""


class Channel:
    """One end of the connection."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._received = bytearray()
        self._sending = threading.Lock()

    def close(self) -> None:
        self._socket.close()

    def send(self, message: object) -> None:
        """Send a record, and wait until the other side has read enough of it.

        Raises:
            OSError: the other side is gone.
        """
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        with self._sending:  # several threads report what they work on
            self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self, patience_s: float | None) -> object | None:
        """Return the next message, or None if it is not complete in time (None: no limit). A partial message is kept.

        Raises:
            EOFError: the other side is gone.
            OSError: the other side is gone in the middle of a message.
            GarbledError: the message is not a record.
        """
        deadline = None if patience_s is None else time.monotonic() + patience_s
        while (message := self._complete_message()) is None:
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._wait(left_s):
                return None
            part = self._socket.recv(_CHUNK_BYTES)
            if not part:
                raise EOFError
            self._received += part
        return message

    def wait_for_end(self) -> None:
        """Return when the other side sends anything more, or is gone."""
        self._wait(None)

    def _wait(self, patience_s: float | None) -> bool:
        poller = select.poll()  # select() itself allows no descriptor above 1,023
        poller.register(self._socket, select.POLLIN)
        return bool(poller.poll(None if patience_s is None else 1000 * patience_s))

    def _complete_message(self) -> object | None:
        if len(self._received) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._received)
        if length > MAX_BYTES:
            raise GarbledError(f"a message of {length:,} bytes")
        end = _LENGTH.size + length
        if len(self._received) < end:
            return None
        data = bytes(self._received[_LENGTH.size : end])
        del self._received[:end]
        return _record(data)


def _record(data: bytes) -> object:
    try:
        return _RecordUnpickler(io.BytesIO(data)).load()
    except Exception as error:
        raise GarbledError(f"{type(error).__name__}: {error}"[:200]) from error


class _RecordUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _RECORD_CLASSES:
            raise pickle.UnpicklingError(f"{module}.{name} is not a record")
        return _RECORD_CLASSES[module, name]
