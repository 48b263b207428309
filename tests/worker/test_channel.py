"""The line between the run and its worker, with the other side as its enemy."""

from __future__ import annotations

import os
import pickle
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from merge_gate.records.refusals import NotJudged
from merge_gate.worker.channel import MAX_BYTES, Channel, GarbledError
from merge_gate.worker.protocol import Finished, Idle, MergeStarted, Unjudged


@pytest.fixture
def line() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours), theirs


def test_messages_come_whole_and_in_order(line: tuple[Channel, socket.socket]) -> None:
    channel, theirs = line
    long = Unjudged(task=1, refusal=NotJudged(message="x" * 5_000_000))
    sent = [MergeStarted(task=1), long, Finished()]
    sender = threading.Thread(target=lambda: [Channel(theirs).send(one) for one in sent])
    sender.start()
    assert [channel.receive(10.0) for _ in sent] == sent
    sender.join()
    assert channel.receive(0.0) is None


def test_half_a_message_is_not_waited_for(line: tuple[Channel, socket.socket]) -> None:
    channel, theirs = line
    data = pickle.dumps(Idle())
    message = struct.pack("!Q", len(data)) + data
    theirs.sendall(message[:20])
    assert channel.receive(0.05) is None
    theirs.sendall(message[20:])
    assert channel.receive(0.05) == Idle()


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Evil()),
        pickle.dumps(os.system),
        b"cmerge_gate.engine.channel\npickle.loads\n.",
        b"\x8c\x16merge_gate.records.terms\x8c\x0edataclass.func\x93.",
        b"not a pickle",
        # New values for the attributes of an enumeration, and of a member.
        b"cmerge_gate.records.terms\nVerdict\nN(dS'FAILED'\nS'passed'\ns\x86b.",
        b"cmerge_gate.records.terms\nVerdict\nS'failed'\n\x85RN(dS'_value_'\nS'passed'\ns\x86b.",
        b"",
    ],
)
def test_nothing_but_records_is_made_of_a_message(
    data: bytes, line: tuple[Channel, socket.socket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    channel, theirs = line
    theirs.sendall(struct.pack("!Q", len(data)) + data)
    with pytest.raises(GarbledError):
        channel.receive(1.0)
    assert not (tmp_path / "ran").exists()


def test_a_message_without_end_is_refused_before_it_is_read(line: tuple[Channel, socket.socket]) -> None:
    channel, theirs = line
    theirs.sendall(struct.pack("!Q", MAX_BYTES + 1))
    with pytest.raises(GarbledError, match="268,435,457 bytes"):
        channel.receive(1.0)


def test_the_end_of_the_other_side_is_heard(line: tuple[Channel, socket.socket]) -> None:
    channel, theirs = line
    theirs.close()
    with pytest.raises(EOFError):
        channel.receive(1.0)


def test_without_a_limit_a_message_is_waited_for(line: tuple[Channel, socket.socket]) -> None:
    channel, theirs = line
    timer = threading.Timer(0.05, Channel(theirs).send, (Idle(),))
    timer.start()
    assert channel.receive(None) == Idle()
    timer.join()


def test_a_wait_for_the_end_returns_when_the_other_side_goes(line: tuple[Channel, socket.socket]) -> None:
    channel, theirs = line
    timer = threading.Timer(0.05, Channel(theirs).close)
    timer.start()
    channel.wait_for_end()
    timer.join()
    with pytest.raises(EOFError):
        channel.receive(None)
