"""The lines between the run and its worker, with the other side as an enemy: events, exceptions, calls of features."""

import importlib
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from merge_gate._internal.errors import EngineError, SourceError
from merge_gate.files.feed import PIECE_BYTES
from merge_gate.judging.all_checks import refused
from merge_gate.records.refusals import MOST_OF_LOG, NotJudged
from merge_gate.records.terms import record
from merge_gate.worker.call_client import CallClient
from merge_gate.worker.call_service import InvalidCallError, Service
from merge_gate.worker.channel import FROM_WORKER, LEAST, MOST, CallChannel, Channel, limits_of
from merge_gate.worker.encoding import GarbledError, Limits, decoded, encoded
from merge_gate.worker.protocol import Answer, Finished, Idle, InProgress, MergeStarted, Unjudged, refusal_of
from tests.support.call_ends import Ends, open_files, wait_until
from tests.support.command import environment


@pytest.fixture
def line() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(ours, FROM_WORKER)
        channel.limits = limits_of(None)
        yield channel, theirs


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
    data = encoded(InProgress(task=1))
    message = struct.pack("!Q", len(data)) + data
    theirs.sendall(message[:20])
    assert channel.receive(0.05) is None
    theirs.sendall(message[20:])
    assert channel.receive(0.05) == InProgress(task=1)


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Evil()),
        pickle.dumps(Idle()),
        b"\x80\x04Nr\x00\x00\x00\x10.",  # a pickle that takes 4 GB
        b"not JSON",
        b"",
        b"null",
        b"{}",
        b'{"Finished":[]}{"Finished":[]}',
        b'{"Finished":[],"InProgress":[1,null]}',
        b'{"Idle":[null,"",0.0,0.0]}',
        b'{"Finished":[1]}',
        b'{"Finished":{}}',
        b'{"NoRecord":[]}',
        b'{"Job":[[],"cpu",false,false]}',
        b'{"MergeStarted":[1]}',
        b'{"MergeStarted":[1,[],null]}',
        b'{"MergeStarted":[true,[]]}',
        b'{"MergeStarted":[1.0,[]]}',
        b'{"MergeStarted":["1",[]]}',
        b'{"MergeStarted":[1,[[]]]}',
        b'{"MergeStarted":[1,{}]}',
        b'{"MergeStarted":[18446744073709551616,[]]}',
        b'{"MergeStarted":[' + b"9" * 6001 + b",[]]}",
        b'{"Unjudged":[1,{"NotJudged":["m","h","no origin",null]}]}',
        b'{"Unjudged":[1,{"Caught":[[],"","",null]}]}',
        b'{"Unjudged":[1,{"Refusal":["kind",{"field":{"Refusal":["kind",{}]}}]}]}',
        b'{"Unjudged":[1,{"Refusal":["kind",{"field":[[["too deep"]]]}]}]}',
        b"[" * 1_000_000,
    ],
    ids=lambda data: repr(data[:40]),
)
def test_nothing_but_records_is_made_of_a_message(data, line, tmp_path, cwd) -> None:
    channel, theirs = line
    sender = threading.Thread(target=theirs.sendall, args=(struct.pack("!Q", len(data)) + data,))
    sender.start()
    with pytest.raises(GarbledError):
        channel.receive(1.0)
    sender.join()
    assert not (tmp_path / "ran").exists()


def test_a_message_without_end_is_refused_before_it_is_read(line: tuple[Channel, socket.socket]) -> None:
    channel, theirs = line
    theirs.sendall(struct.pack("!Q", LEAST.bytes + 1))
    with pytest.raises(GarbledError, match="16,777,217 bytes"):
        channel.receive(1.0)


def test_the_values_of_a_message_are_counted_before_they_are_made(line: tuple[Channel, socket.socket]) -> None:
    channel, theirs = line
    data = b'{"MergeStarted":[1,[' + b"1," * LEAST.values + b"1]]}"
    sender = threading.Thread(target=theirs.sendall, args=(struct.pack("!Q", len(data)) + data,))
    sender.start()
    with pytest.raises(GarbledError, match=r"2,097,15\d values"):
        channel.receive(10.0)
    sender.join()


@pytest.mark.parametrize("nested", [b'{"k":' * 900 + b"1" + b"}" * 900, b'{"k":1}'], ids=["deep", "flat"])
def test_the_keys_of_a_message_are_counted_before_they_are_made(nested: bytes) -> None:
    data = b"[" + b",".join([nested] * (LEAST.values // 7 // nested.count(b":"))) + b"]"
    with pytest.raises(GarbledError, match=r"a message of 29\d,\d\d\d keys"):
        decoded(data, FROM_WORKER, LEAST)


@pytest.mark.parametrize("nested", [b"[" * 900 + b"]" * 900, b"[]"], ids=["deep", "flat"])
def test_the_lists_of_a_message_are_counted_before_they_are_made(nested: bytes) -> None:
    data = b"[" + b",".join([nested] * (LEAST.values // 3 // nested.count(b"["))) + b"]"
    with pytest.raises(GarbledError, match=r"a message of 69\d,\d\d\d lists"):
        decoded(data, FROM_WORKER, LEAST)


@pytest.mark.parametrize("number", [b"1.5", b"1e9", b"-9E9"])
def test_the_fractions_of_a_message_are_counted_before_they_are_made(number: bytes) -> None:
    data = b"[" + b",".join([number] * (LEAST.values // 7)) + b"]"
    with pytest.raises(GarbledError, match=r"a message of 299,593 fractions"):
        decoded(data, FROM_WORKER, LEAST)


def largest(item: bytes, per: Limits) -> bytes:
    """As many of these as the limits of the largest message allow. Each one takes so much of them."""
    return b",".join([item] * min(most // (used or 1) - 100 for used, most in zip(per, MOST, strict=True) if used))


FACTS = b'{"BaseFacts":["b",null,"bfloat16","none",[PAIRS],0,[TENSORS],"",[],[],[],null,""]}'
STATS = b'{"TensorStats":["w","float32",[2,3],6,-0.5,1.25,0,0,0,[0,1],false]}'
LARGEST = {
    "one text": b'{"Unjudged":[0,{"NotJudged":["\\ud83d\\ude00' + b"x" * (MOST.bytes - 99) + b'","","runtime",null]}]}',
    "lists": b"[" + largest(b"[" * 900 + b"]" * 900, Limits(0, 4 * 901)) + b"]",
    "long numbers": b'{"MergeStarted":["' + b"9" * 20 + b'",[' + largest(b"1" * 15, Limits(16, 1)) + b"]]}",
    "pairs": b'{"BaseMeasured":[0,0,FACTS,null]}'.replace(
        b"FACTS", FACTS.replace(b"PAIRS", largest(b'["a",1]', Limits(8, 4))).replace(b"TENSORS", b"")
    ),
    "records": b'{"BaseMeasured":[0,0,FACTS,null]}'.replace(
        b"FACTS", FACTS.replace(b"TENSORS", largest(STATS, Limits(len(STATS) + 1, 20))).replace(b"PAIRS", b"")
    ),
    "files": b'{"BaseLoaded":[0,0,FACTS,[FILES],true,0.5]}'.replace(
        b"FACTS", FACTS.replace(b"TENSORS", b"").replace(b"PAIRS", largest(b'["a",1.2345678901234567]', Limits(24, 16)))
    ).replace(b"FILES", largest(b'{"FileIdentity":["a",1,2,3,4,5]}', Limits(33, 11))),
}
"""The largest messages of each kind."""

PEAK = """if True:
    import sys, time
    from pathlib import Path
    from merge_gate.worker.channel import FROM_WORKER, MOST
    from merge_gate.worker.encoding import GarbledError, decoded

    def bytes_of(key):
        return int(Path("/proc/self/status").read_text().split(key, 1)[1].split()[0]) * 1024

    decoded(b'{"Finished":[]}', FROM_WORKER, MOST)
    data = sys.stdin.buffer.read()
    before, began_s, made = bytes_of("VmRSS:"), time.process_time(), "made"
    try:
        message = decoded(data, FROM_WORKER, MOST)
    except GarbledError as error:
        made = "refused"
        assert " a message of" not in str(error), error
    print(time.process_time() - began_s, bytes_of("VmHWM:") - before, made)
"""


@pytest.mark.parametrize("kind", LARGEST)
def test_the_largest_messages_take_a_second_and_a_gibibyte_at_most(kind: str) -> None:
    """They stay within every limit. The time is that of a slow machine."""
    assert len(LARGEST[kind]) <= MOST.bytes
    command = [sys.executable, "-P", "-c", PEAK]
    done = subprocess.run(command, input=LARGEST[kind], env=environment(), capture_output=True, check=True)
    taken_s, taken_bytes, _ = done.stdout.split()
    assert float(taken_s) < 2.0
    assert int(taken_bytes) < 1 << 30


def test_a_message_that_comes_byte_by_byte_takes_no_longer_than_asked(line: tuple[Channel, socket.socket]) -> None:
    channel, theirs = line
    ended = threading.Event()

    def drip() -> None:
        theirs.sendall(struct.pack("!Q", 1 << 20))
        while not ended.wait(0.001):
            theirs.send(b" ")

    sender = threading.Thread(target=drip)
    sender.start()
    began_s = time.monotonic()
    assert channel.receive(0.1) is None
    assert time.monotonic() - began_s < 1.0
    ended.set()
    sender.join()


def test_the_end_of_the_other_side_is_heard(line: tuple[Channel, socket.socket]) -> None:
    channel, theirs = line
    theirs.close()
    with pytest.raises(EOFError):
        channel.receive(1.0)


def test_without_a_limit_a_message_is_waited_for(line: tuple[Channel, socket.socket]) -> None:
    channel, theirs = line
    timer = threading.Timer(0.05, Channel(theirs).send, (Finished(),))
    timer.start()
    assert channel.receive(None) == Finished()
    timer.join()


def test_a_wait_for_the_end_returns_when_the_other_side_goes(line: tuple[Channel, socket.socket]) -> None:
    channel, theirs = line
    timer = threading.Timer(0.05, Channel(theirs).close)
    timer.start()
    channel.wait_for_end()
    timer.join()
    with pytest.raises(EOFError):
        channel.receive(None)


BUG = refused(refusal_of(ValueError("x"))).hint
"""What is to be done about an exception that nothing explains. The sentences are in the golden of tests/judging."""


def test_the_log_of_an_exception_is_bounded_in_the_worker() -> None:
    """A message can name every tensor of a file, and the log goes through the channel."""
    error = refusal_of(ValueError("x" * 1_000_000)).fields["error"]
    assert len(error.log) == MOST_OF_LOG


def test_an_exception_becomes_a_sentence() -> None:
    finding = refused(refusal_of(ValueError("\n  first line\nsecond line")))
    assert "ValueError: first line" in finding.message
    assert "second" not in finding.message
    assert finding.hint == BUG
    assert "ValueError" in refused(refusal_of(ValueError())).message
    assert len(refused(refusal_of(ValueError("x" * 9000))).message) < 600


def test_our_own_errors_keep_their_hint() -> None:
    assert refusal_of(EngineError("what", hint="what next")) == NotJudged(message="what", hint="what next")


def test_out_of_memory_is_told_from_a_bug() -> None:
    import torch  # noqa: PLC0415 - see conftest

    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(1 << 60, dtype=torch.uint8)
    refusal = refused(refusal_of(MemoryError()))
    assert refusal.hint not in {"", BUG}
    for error in (of_torch.value, torch.OutOfMemoryError("CUDA out of memory")):
        assert refused(refusal_of(error)) == refusal


def test_a_file_that_went_away_is_told_from_a_bug() -> None:
    refusal = refused(refusal_of(FileNotFoundError(2, "No such file or directory", "model.safetensors")))
    assert "model.safetensors" in refusal.message
    assert refusal.hint not in {"", BUG}


def test_a_library_that_cannot_be_imported_is_told_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared object that is not there is an OSError, as torch raises it; one of a Python module an ImportError."""
    (tmp_path / "broken_library.py").write_text("import ctypes\nctypes.CDLL('libnowhere.so.1')\n")
    (tmp_path / "broken_extension.py").write_text("from os import no_such_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    hints = set()
    for name, words in (("broken_library", "libnowhere.so.1"), ("broken_extension", "no_such_name")):
        with pytest.raises((OSError, ImportError)) as caught:
            importlib.import_module(name)
        refusal = refused(refusal_of(caught.value))
        assert words in refusal.message
        assert refusal.hint not in {"", BUG}
        hints.add(refusal.hint)
    assert len(hints) == 1
    assert refused(refusal_of(FileNotFoundError(2, "No such file or directory", "x"))).hint not in hints


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
    own, other = CallChannel.pair(Asked, LEAST)
    own.send(Idle())
    with pytest.raises(SourceError):
        CallClient([other]).call(Asked(text=""))
    for channel in (own, other):
        channel.close()
