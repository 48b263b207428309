"""The worker's connection to the process that writes published models."""

from __future__ import annotations

import os
import random
import socket
import threading
from typing import TYPE_CHECKING

import pytest

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
from merge_gate.worker.publish_client import PART_BYTES, PublishClient

if TYPE_CHECKING:
    from collections.abc import Iterator

WINDOW_BYTES = 3 * PART_BYTES
TENSOR = StoredTensor(name="a", dtype="BF16", shape=(2, 3), file="model.safetensors")


class Writer:
    """The other side: it takes each part, and keeps the bytes."""

    def __init__(self, end: socket.socket, *, most_parts: int = 1 << 30, takes_plans: bool = True) -> None:
        self._socket, self._channel, self._left = end, Channel(end), most_parts
        self._takes_plans = takes_plans
        self._window = os.memfd_create("window")
        os.ftruncate(self._window, WINDOW_BYTES)
        self.bytes: dict[tuple[int, str], bytearray] = {}
        self.messages: list[object] = []
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        has_window = False
        try:
            while (message := self._channel.receive(10.0)) is not None:
                if not isinstance(message, TensorPart):
                    self.messages.append(message)
                if isinstance(message, PublicationPlanned) and not has_window:
                    socket.send_fds(self._socket, [WINDOW_BYTES.to_bytes(8, "big")], [self._window])
                    has_window = True
                if isinstance(message, PublicationPlanned) and self._takes_plans:
                    self._channel.send(PlanTaken(task=message.task))
                if isinstance(message, TensorPart) and not self._take(message):
                    return
        except EOFError:
            pass
        finally:
            self._socket.close()
            os.close(self._window)

    def _take(self, part: TensorPart) -> bool:
        self._left -= 1
        if self._left < 0:
            return False
        whole = self.bytes.setdefault((part.task, part.name), bytearray())
        whole.extend(bytes(max(0, part.offset + part.size_bytes - len(whole))))
        whole[part.offset : part.offset + part.size_bytes] = os.pread(self._window, part.size_bytes, part.start)
        os.pwrite(self._window, b"\xff" * part.size_bytes, part.start)
        self._channel.send(PartTaken(start=part.start))
        return True


@pytest.fixture
def ends() -> Iterator[tuple[PublishClient, socket.socket]]:
    ours, theirs = socket.socketpair()
    client = PublishClient(ours)
    yield client, theirs
    client.close()


def test_all_bytes_arrive_before_the_end(ends: tuple[PublishClient, socket.socket]) -> None:
    client, writer = ends[0], Writer(ends[1])
    data = {task: random.Random(task).randbytes(2 * PART_BYTES + 5) for task in range(4)}

    def send(task: int) -> None:
        client.plan(task, [TENSOR])
        for start in (0, PART_BYTES + 1):
            client.send(task, "a", start, memoryview(data[task])[start : start + PART_BYTES + 1])
        client.send(task, "a", 2 * PART_BYTES + 2, memoryview(data[task])[2 * PART_BYTES + 2 :])
        client.finish(task, [TENSOR], None)

    threads = [threading.Thread(target=send, args=(task,)) for task in data]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client.close()
    writer.thread.join()
    assert {task: bytes(whole) for (task, _), whole in writer.bytes.items()} == data
    assert {one for one in writer.messages if isinstance(one, PublicationPlanned)} == {
        PublicationPlanned(task=task, tensors=(TENSOR,)) for task in data
    }
    assert {one for one in writer.messages if isinstance(one, PublicationSent)} == {
        PublicationSent(task=task, tensors=(TENSOR,)) for task in data
    }


def test_a_refusal_needs_no_window(ends: tuple[PublishClient, socket.socket]) -> None:
    client, writer = ends[0], Writer(ends[1])
    refusal = NotJudged(message="no")
    client.finish(3, (), refusal)
    client.close()
    writer.thread.join()
    assert writer.messages == [PublicationSent(task=3, refusal=refusal)]


def test_a_writer_that_is_gone_is_an_error_for_every_sender(ends: tuple[PublishClient, socket.socket]) -> None:
    client, writer = ends[0], Writer(ends[1], most_parts=2)
    client.plan(0, [TENSOR])
    with pytest.raises(EngineError):
        client.send(0, "a", 0, memoryview(bytes(6 * PART_BYTES)))
    writer.thread.join()
    with pytest.raises(EngineError):
        client.finish(0, [TENSOR], None)


def test_a_plan_that_is_not_taken_is_an_error(ends: tuple[PublishClient, socket.socket]) -> None:
    client, writer = ends[0], Writer(ends[1], takes_plans=False)
    ended = threading.Timer(0.2, lambda: ends[1].shutdown(socket.SHUT_RDWR))
    ended.start()
    with pytest.raises(EngineError):
        client.plan(0, [TENSOR])
    writer.thread.join()
    ended.join()
