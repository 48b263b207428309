"""The line between the run and its worker: whole messages, and never a longer wait than is allowed.

In: one end of a pair of sockets. Out: records. What comes from the worker may have been written by a base's own code,
so nothing but records is made of it: a pickle that names anything else is refused, as is one without end.
"""

from __future__ import annotations

import io
import pickle
import select
import socket
import struct
import time

from merge_gate.records import config, files, measured, refusals, report, terms
from merge_gate.worker import protocol

_LENGTH = struct.Struct("!Q")
_CHUNK_BYTES = 1 << 20

LONGEST_BYTES = 1 << 28
"""A message that says that it is longer is none."""

_KNOWN = {
    (one.__module__, one.__qualname__): one
    for module in (terms, config, files, measured, refusals, report, protocol)
    for one in vars(module).values()
    if isinstance(one, type) and one.__module__ == module.__name__
}


class GarbledError(Exception):
    """What came is no message."""


class Channel:
    """One end."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._received = bytearray()

    def close(self) -> None:
        self._socket.close()

    def send(self, message: object) -> None:
        """Send a record; waits for as long as the other side does not read.

        Raises:
            OSError: nobody is there.
        """
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self, patience_s: float | None) -> object | None:
        """The next message; None where it has not come whole in this time (None: no limit). What came of it is kept.

        Raises:
            EOFError: the other side is gone.
            OSError: the same, within a message.
            GarbledError: it is no record.
        """
        deadline = None if patience_s is None else time.monotonic() + patience_s
        while (message := self._whole()) is None:
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._wait(left_s):
                return None
            part = self._socket.recv(_CHUNK_BYTES)
            if not part:
                raise EOFError
            self._received += part
        return message

    def wait_for_end(self) -> None:
        """Return when the other side says anything more, or is gone."""
        self._wait(None)

    def _wait(self, patience_s: float | None) -> bool:
        poller = select.poll()  # select() itself knows no descriptor above 1,023
        poller.register(self._socket, select.POLLIN)
        return bool(poller.poll(None if patience_s is None else 1000 * patience_s))

    def _whole(self) -> object | None:
        if len(self._received) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._received)
        if length > LONGEST_BYTES:
            raise GarbledError(f"a message of {length:,} bytes")
        end = _LENGTH.size + length
        if len(self._received) < end:
            return None
        data = bytes(self._received[_LENGTH.size : end])
        del self._received[:end]
        return _record(data)


def _record(data: bytes) -> object:
    try:
        return _Records(io.BytesIO(data)).load()
    except Exception as error:
        raise GarbledError(f"{type(error).__name__}: {error}"[:200]) from error


class _Records(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name} is no record")
        return _KNOWN[module, name]
