"""Sends and receives whole messages between the run and its worker, over pairs of sockets, also with bytes and files.

A base's own code may write to the worker's end. So only records and their enumerations are unpickled, whose
`__setstate__` keeps a pickle from changing the classes. One that names another class, or is too large, is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pickle
import select
import socket
import struct
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from types import ModuleType

from merge_gate.files.feed import PIECE_BYTES
from merge_gate.records import config, files, measured, refusals, report, terms
from merge_gate.records.features import FEATURES, module_name
from merge_gate.worker import protocol

_LENGTH = struct.Struct("!Q")
_CHUNK_BYTES = 1 << 20

MOST_FILES = 253
"""The kernel's limit (SCM_MAX_FD)."""

MAX_BYTES = 1 << 28
"""Messages that declare a larger size are refused."""


def _records_in(*modules: ModuleType) -> dict[tuple[str, str], type]:
    return {
        (cls.__module__, cls.__qualname__): cls
        for module in modules
        for cls in vars(module).values()
        if isinstance(cls, type) and cls.__module__ == module.__name__ and hasattr(cls, "__setstate__")
        if not issubclass(cls, Exception)
    }


_RECORDS = _records_in(terms, config, files, measured, refusals, report, protocol)
_OF_FEATURES = frozenset(module_name(name, "records") for name, places in FEATURES.items() if "records" in places)
"""Modules of further records."""


class GarbledError(Exception):
    """The received bytes are not a message."""


class Channel:
    """One end of the connection, which takes at most so many open files with a message: the parent takes none.

    `calls` are further records, which messages may be.
    """

    def __init__(self, end: socket.socket, most_files: int = 0, calls: Iterable[type] = ()) -> None:
        self._socket, self._most_files = end, most_files
        self._classes = _RECORDS | {(cls.__module__, cls.__qualname__): cls for cls in calls}
        self._received, self._files = bytearray(), list[int]()
        self._sending = threading.Lock()

    def close(self) -> None:
        self._socket.close()

    def send(self, message: object, files: Sequence[int] = ()) -> None:
        """Send a record, and wait until the other side has read enough of it. Open `files` come with it.

        Raises:
            OSError: the other side is gone.
        """
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        data = _LENGTH.pack(len(data)) + data
        with self._sending:  # several threads report what they work on
            for start in range(0, len(files), MOST_FILES):  # each with a byte of the message
                socket.send_fds(self._socket, [data[:1]], files[start : start + MOST_FILES])
                data = data[1:]
            self._socket.sendall(data)

    def receive(self, patience_s: float | None = None) -> object | None:
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
            part, files, *_ = socket.recv_fds(self._socket, _CHUNK_BYTES, self._most_files)
            self._files += files
            if not part:
                raise EOFError
            self._received += part
        return message

    def taken_files(self) -> list[int]:
        """The open files that came since the last call. They are the caller's."""
        files, self._files = self._files, []
        return files

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
        try:
            message: object = _RecordUnpickler(data, self._classes).load()
        except Exception as error:
            raise GarbledError(f"{type(error).__name__}: {error}"[:200]) from error
        return message


class CallChannel(Channel):
    """One end of a connection for calls of the worker, whose answers come with up to `PIECE_BYTES` of bytes, or files.

    The bytes are in memory that both ends share.
    """

    def __init__(self, end: socket.socket, window: int, most_files: int = 0, calls: Iterable[type] = ()) -> None:
        super().__init__(end, most_files, calls)
        self.window = window

    @classmethod
    def pair(cls, calls: Iterable[type]) -> tuple[CallChannel, CallChannel]:
        """The parent's end of a new channel for `calls`, and the other one. Neither can change the memory's size."""
        window = os.memfd_create("merge-gate-call", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(window, PIECE_BYTES)
        fcntl.fcntl(window, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        own, other = socket.socketpair()
        return cls(own, window, calls=calls), cls(other, os.dup(window), MOST_FILES)

    @classmethod
    def of(cls, socket_descriptor: int, window: int) -> CallChannel:
        """The end that a process got as these descriptors."""
        return cls(socket.socket(fileno=socket_descriptor), window, MOST_FILES)

    def detached(self) -> tuple[int, int]:
        """The descriptors of this end. The caller closes them, and nothing else of this end is used any more."""
        return self._socket.detach(), self.window

    def take(self, into: memoryview) -> None:
        """Copy out of the memory. A system call, unlike a mapping, lets other threads run meanwhile."""
        done = 0
        while done < len(into):
            done += os.preadv(self.window, [into[done:]], done)

    def hang_up(self) -> None:
        """End the connection: both ends get an error."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        super().close()
        os.close(self.window)


class _RecordUnpickler(pickle.Unpickler):
    def __init__(self, data: bytes, classes: Mapping[tuple[str, str], type]) -> None:
        super().__init__(io.BytesIO(data))
        self._classes = classes

    def find_class(self, module: str, name: str) -> type:
        classes = _records_in(import_module(module)) if module in _OF_FEATURES else self._classes
        if (module, name) not in classes:
            raise pickle.UnpicklingError(f"{module}.{name} is not a record")
        return classes[module, name]
