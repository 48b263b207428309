"""The service that takes merged tensors: copies that the worker cannot change, and no message that it does not know."""

from __future__ import annotations

import mmap
import socket
from collections.abc import Iterator

import pytest

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
from merge_gate.worker.publish_service import MOST_TENSORS, WINDOW_BYTES, PublishService

TENSOR = StoredTensor(name="a.weight", dtype="BF16", shape=(2, 2))
PLAN = PublicationPlanned(task=3, tensors=(TENSOR,))


class Recorder:
    def __init__(self) -> None:
        self.calls: list[object] = []

    def planned(self, task: int, tensors: tuple[StoredTensor, ...]) -> None:
        self.calls.append((task, tensors))

    def part(self, task: int, name: str, offset: int, content: memoryview) -> None:
        self.calls.append((task, name, offset, bytes(content)))

    def sent(self, message: PublicationSent) -> None:
        self.calls.append(message)


class Worker:
    """The worker's end."""

    def __init__(self) -> None:
        own, self.socket = socket.socketpair()
        self.publisher = Recorder()
        self.service = PublishService(own, self.publisher, (3,))
        self.channel = Channel(self.socket)
        self.service.start()

    def window(self) -> mmap.mmap:
        size, descriptors, _, _ = socket.recv_fds(self.socket, 8, 1)
        assert int.from_bytes(size, "big") == WINDOW_BYTES
        assert self.channel.receive(5) == PlanTaken(task=3)
        return mmap.mmap(descriptors[0], WINDOW_BYTES)


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.socket.close()
    worker.service.close()


def test_parts_are_copied_and_passed_on_in_order(worker: Worker) -> None:
    sent = PublicationSent(task=3, tensors=(TENSOR,), refusal=NotJudged(message="no", hint=""))
    worker.channel.send(PLAN)
    window = worker.window()
    for offset, content in ((4, b"efgh"), (0, b"abcd")):
        window[8:12] = content
        worker.channel.send(TensorPart(task=3, name="a.weight", offset=offset, start=8, size_bytes=4))
        assert worker.channel.receive(5) == PartTaken(start=8)
        window[8:12] = b"xxxx"
    worker.channel.send(PLAN)
    worker.channel.send(sent)
    worker.socket.shutdown(socket.SHUT_WR)
    worker.service.drain()
    plan = (3, (TENSOR,))
    parts = [(3, "a.weight", 4, b"efgh"), (3, "a.weight", 0, b"abcd")]
    assert worker.publisher.calls == [plan, *parts, plan, sent]


def part(**changes: object) -> TensorPart:
    fields = {"task": 3, "name": "a.weight", "offset": 0, "start": 0, "size_bytes": 4} | changes
    return TensorPart(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "message",
    [
        PublicationPlanned(task=4, tensors=()),
        PublicationPlanned(task=3, tensors=("a",)),  # type: ignore[arg-type]
        PublicationPlanned(task=3, tensors=(StoredTensor(name="a", dtype="BF16", shape=(-1,)),)),
        PublicationPlanned(task=3, tensors=(TENSOR,) * (MOST_TENSORS + 1)),
        PublicationSent(task=4),
        part(task=4),
        part(size_bytes=0),
        part(start=-1),
        part(start=WINDOW_BYTES - 3),
        part(size_bytes=WINDOW_BYTES + 1),
        part(name=b"a"),
        PartTaken(start=0),
    ],
)
def test_a_message_that_the_gate_never_sends_ends_the_service(worker: Worker, message: object) -> None:
    worker.channel.send(PLAN)
    worker.window()
    worker.channel.send(message)
    with pytest.raises((EOFError, OSError)):
        worker.channel.receive(5)
    worker.service.drain()
    assert worker.publisher.calls == [(3, (TENSOR,))]


def test_a_part_without_a_plan_ends_the_service(worker: Worker) -> None:
    worker.channel.send(part())
    with pytest.raises((EOFError, OSError)):
        worker.channel.receive(5)
    assert worker.publisher.calls == []
