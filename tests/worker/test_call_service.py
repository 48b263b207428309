"""Calls of a feature arrive, with their bytes and files; what no feature of the run names ends the service."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from merge_gate._internal.errors import SourceError
from merge_gate.files.feed import PIECE_BYTES
from merge_gate.records.terms import record
from merge_gate.worker.call_client import CallClient
from merge_gate.worker.call_service import InvalidCallError, Service
from merge_gate.worker.channel import CallChannel
from merge_gate.worker.protocol import Answer, Idle
from tests.support.call_ends import Ends, open_files, wait_until


@record
class Asked:
    """A call of a feature."""

    text: str


@record
class AskedByAnother:
    """A call of a feature that the run does not use."""

    text: str


class Letters(Service):
    """Answers with the text, in a file, or as bytes."""

    calls = (Asked,)

    def __init__(self, directory: Path) -> None:
        self.directory, self.events = directory, list[str]()
        self.may_end = threading.Event()
        self.may_end.set()

    def answer(self, call: Asked, memory: memoryview) -> tuple[int, ...]:
        self.may_end.wait()
        if call.text == "invalid":
            raise InvalidCallError
        if call.text.startswith("/"):
            return (os.open(self.directory / call.text[1:], os.O_CREAT | os.O_WRONLY),)
        memory[: len(call.text)] = call.text.encode()
        return ()

    def cancel(self) -> None:
        self.events.append("canceled")
        self.may_end.set()

    def end(self) -> None:
        self.events.append("ended")


@pytest.fixture
def service(tmp_path: Path) -> Letters:
    return Letters(tmp_path)


@pytest.fixture
def ends(service: Letters) -> Iterator[Ends]:
    both = Ends(service)
    yield both
    both.close()


def test_bytes_and_files_come_with_the_answer(ends: Ends, tmp_path: Path) -> None:
    texts = [f"{number:03}" for number in range(100)]
    memory = [memoryview(bytearray(3)) for _ in texts]
    ends.client.fetch((Asked(text=text), into) for text, into in zip(texts, memory, strict=True))
    assert [into.tobytes().decode() for into in memory] == texts
    answer, (descriptor,) = ends.client.call(Asked(text="/a"))
    assert answer == Answer(files=1)
    wait_until(lambda: open_files(tmp_path) == 1)
    os.write(descriptor, b"x")
    os.close(descriptor)
    assert (tmp_path / "a").read_bytes() == b"x"


def test_a_call_that_fails_reaches_the_worker_before_the_next(ends: Ends) -> None:
    with pytest.raises(SourceError, match="FileNotFoundError"):
        ends.client.call(Asked(text="/absent/b"))
    assert ends.client.call(Asked(text="")) == (Answer(), [])


@pytest.mark.parametrize("message", [Asked(text="invalid"), AskedByAnother(text=""), Answer(), Idle()], ids=str)
def test_what_no_service_answers_ends_all_lines(message: object, ends: Ends) -> None:
    assert ends.call(Asked(text="")) == Answer()
    with pytest.raises((EOFError, OSError)):
        ends.call(message)
    for channel in ends.of_worker:  # they end one after the other
        with pytest.raises(EOFError):
            channel.receive()
    with pytest.raises(SourceError):
        ends.client.call(Asked(text=""))


def test_the_end_waits_for_no_call(ends: Ends, service: Letters) -> None:
    service.may_end.clear()
    waiting = threading.Thread(target=ends.of_worker[0].send, args=(Asked(text="x"),))
    waiting.start()
    waiting.join()
    ends.end()
    assert service.events == ["canceled", "ended"]
    with pytest.raises(SourceError):
        ends.client.call(Asked(text=""))


def test_the_memory_of_a_channel_keeps_its_size(ends: Ends) -> None:
    """Otherwise, the parent would get a SIGBUS."""
    for channel in ends.of_worker:
        for size_bytes in (0, 2 * PIECE_BYTES):
            with pytest.raises(PermissionError):
                os.ftruncate(channel.window, size_bytes)


def test_a_parent_that_sends_something_else_is_an_error() -> None:
    own, other = CallChannel.pair(())
    own.send(Idle())
    with pytest.raises(SourceError):
        CallClient([other]).call(Asked(text=""))
    for channel in (own, other):
        channel.close()
