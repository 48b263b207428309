"""Sends and receives whole messages between the run and its worker, over pairs of sockets, also with bytes and files.

A base's own code may write to the worker's end. So only data is read (encoding.py), within limits.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any

from merge_gate.files.feed import PIECE_BYTES
from merge_gate.worker.encoding import GarbledError, Limits, decoded, encoded
from merge_gate.worker.protocol import Answer, Job, PickleListed, PickleNamed, Sent

_LENGTH = struct.Struct("!Q")
_CHUNK_BYTES = 1 << 20

MOST_FILES = 253
"""The kernel's limit (SCM_MAX_FD)."""

MOST, BYTES_OF_A_TENSOR = Limits(32 << 20, 2 << 20), 2048
LEAST = MOST._replace(bytes=16 << 20)
"""What a message to the parent may take, by the tensors of a job. The figures of a tensor have about 300 bytes and 30
values. The largest message makes the parent take about 300 MiB, and less than a second of the CPU."""

CALL_SHARE = 4
"""A call may take a fourth of that: several come at a time."""

FROM_WORKER = Sent | PickleListed
TO_WORKER = Job | PickleNamed


def limits_of(job: Job | None) -> Limits:
    """How large the messages from a worker with this job may be. None: it has none yet."""
    tensors = 0
    for group in job.groups if job is not None else ():
        own = sum(len(file.tensors) for task in group.tasks for file in task.files)
        tensors += len(group.files.tensors) + own
    return LEAST._replace(bytes=min(LEAST.bytes + BYTES_OF_A_TENSOR * tensors, MOST.bytes))


class Channel:
    """One end of the connection, which receives these records, and with each at most so many open files.

    The parent takes no files, and sets `limits`.
    """

    def __init__(self, end: socket.socket, receives: Any = TO_WORKER, most_files: int = 0) -> None:
        self._socket, self._receives, self._most_files = end, receives, most_files
        self.limits: Limits | None = None
        self._received, self._files = bytearray(), list[int]()
        self._sending = threading.Lock()

    def close(self) -> None:
        self._socket.close()

    def send(self, message: object, files: Sequence[int] = ()) -> None:
        """Send a record, and wait until the other side has read enough of it. Open `files` come with it.

        Raises:
            OSError: the other side is gone.
            EncodingError: the record cannot be sent.
        """
        self.send_encoded(encoded(message), files)

    def send_encoded(self, data: bytes, files: Sequence[int] = ()) -> None:
        """`send`, with the bytes of a record."""
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
            GarbledError: the message is none of the records that this end receives.
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
            if left_s == 0.0:  # the other side may send each byte by itself
                return self._complete_message()
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
        if self.limits is not None and length > self.limits.bytes:
            raise GarbledError(f"a message of {length:,} bytes")
        end = _LENGTH.size + length
        if len(self._received) < end:
            return None
        data = bytes(self._received[_LENGTH.size : end])
        del self._received[:end]
        message: object = decoded(data, self._receives, self.limits)
        return message


class CallChannel(Channel):
    """One end of a connection for calls of the worker, whose answers come with up to `PIECE_BYTES` of bytes, or files.

    The bytes are in memory that both ends share.
    """

    def __init__(self, end: socket.socket, window: int, receives: Any, most_files: int = 0) -> None:
        super().__init__(end, receives, most_files)
        self.window = window

    @classmethod
    def pair(cls, calls: Any, limits: Limits) -> tuple[CallChannel, CallChannel]:
        """The parent's end of a new channel for `calls`, and the other one. Neither can change the memory's size."""
        window = os.memfd_create("merge-gate-call", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(window, PIECE_BYTES)
        fcntl.fcntl(window, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        own, other = socket.socketpair()
        parents = cls(own, window, calls)
        parents.limits = Limits(limits.bytes // CALL_SHARE, limits.values // CALL_SHARE)
        return parents, cls(other, os.dup(window), Answer, MOST_FILES)

    @classmethod
    def of(cls, socket_descriptor: int, window: int) -> CallChannel:
        """The end that a process got as these descriptors."""
        return cls(socket.socket(fileno=socket_descriptor), window, Answer, MOST_FILES)

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
