"""Both ends of the lines, connected in one process: reads have the bytes of the files, and what is sent arrives."""

from __future__ import annotations

import hashlib
import itertools
import mmap
import os
import random
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from merge_gate._internal.errors import EngineError, NotPublishedError, SourceError
from merge_gate.features.publish.weight_files import ModelLayout, ModelWriter, new_file
from merge_gate.features.stream import read_ahead
from merge_gate.features.stream.read_ahead import FedBase, LocalFiles
from merge_gate.files.feed import PIECE_BYTES
from merge_gate.records.files import BaseFiles, FileSpan, StoredTensor
from merge_gate.records.refusals import NotJudged
from merge_gate.records.terms import BaseKey, Quantization
from merge_gate.worker import call_client, call_service
from merge_gate.worker.call_client import CallClient, ParentFeed
from merge_gate.worker.call_service import LINES, MOST_TENSORS, CallService, Feeds
from merge_gate.worker.channel import Line
from merge_gate.worker.protocol import (
    Answer,
    BytesRequested,
    Group,
    Idle,
    PublicationPlanned,
    PublicationWritten,
    SpansExpected,
)

PAGE = mmap.PAGESIZE
SIZES = (20 * PAGE + 7, 1, 9 * PAGE)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (read_ahead, call_client):
        monkeypatch.setattr(module, "PIECE_BYTES", 2 * PAGE)
    monkeypatch.setattr(read_ahead, "CHUNK_BYTES", PAGE)
    monkeypatch.setattr(read_ahead, "CONNECTIONS", 3)
    monkeypatch.setattr(call_service, "_slots", lambda: 4)


@pytest.fixture
def content(tmp_path: Path) -> dict[str, bytes]:
    numbers = random.Random(3)
    written = {f"{number}.safetensors": numbers.randbytes(size) for number, size in enumerate(SIZES)}
    for name, data in written.items():
        (tmp_path / name).write_bytes(data)
    return written


class Recorder:
    """Makes the files of tasks 0 to 3: each plan has one, or as many as `names` has."""

    def __init__(self, directory: Path) -> None:
        self.calls: list[object] = []
        self.directory, self.names = directory, ("model.safetensors",)

    def planned(self, task: int, tensors: tuple[StoredTensor, ...]) -> tuple[int, ...]:
        self.calls.append((task, tensors))
        if self.names == ("refused",):
            raise NotPublishedError("the disk is full")
        files = tuple(new_file(f"{task} {name}", tensors, None) for name in self.names)
        return ModelWriter(self.directory, ModelLayout(files=files)).make_files()

    def written(self, message: PublicationWritten) -> None:
        self.calls.append(message)

    def ended(self) -> None:
        """Nothing is left."""


class Ends:
    """Both ends: `base` is what the parent reads, as each group of the job."""

    def __init__(self, base: FedBase, directory: Path) -> None:
        self.base, self.publisher = base, Recorder(directory)
        self.own, self.of_worker = zip(*(Line.pair() for _ in range(LINES)), strict=True)
        self.service = CallService(self.own, lambda _: self.base, self.publisher, range(4))
        self.service.start()
        self.client = CallClient(self.of_worker)

    def call(self, message: object) -> object:
        """Call as code of a base may: with any message."""
        self.of_worker[0].send(message)
        return self.of_worker[0].receive()

    def close(self) -> None:
        self.service.close()
        for line in (*self.own, *self.of_worker):
            line.close()


@pytest.fixture
def ends(tmp_path: Path, content: dict[str, bytes]) -> Iterator[Ends]:
    files = LocalFiles(str(tmp_path), list(content))
    files.sha256 = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    both = Ends(FedBase(files), tmp_path / "models")
    yield both
    both.close()


def spans_of(content: dict[str, bytes], seed: int = 0) -> list[FileSpan]:
    """Every file cut at random places, some of them left out."""
    numbers, spans = random.Random(seed), []
    for name, data in content.items():
        cuts = sorted({0, len(data), *(numbers.randrange(len(data)) for _ in range(12))})
        spans += [FileSpan(file=name, start=start, end=end) for start, end in itertools.pairwise(cuts)]
    return [span for span in spans if numbers.random() < 0.9 or span.end == len(content[span.file])]


def read(client: ParentFeed, span: FileSpan) -> bytes:
    buffer = bytearray(span.end - span.start)
    client.read(span.file, span.start, memoryview(buffer))
    return bytes(buffer)


def read_all(client: ParentFeed, spans: Iterable[FileSpan]) -> None:
    for span in spans:
        read(client, span)


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.01)


def expected(content: dict[str, bytes], span: FileSpan) -> bytes:
    return content[span.file][span.start : span.end]


@pytest.mark.parametrize("seed", range(4))
def test_spans_that_are_read_in_order_have_the_bytes_of_the_files(
    seed: int, ends: Ends, content: dict[str, bytes]
) -> None:
    client = ends.client.feed(0)
    spans = spans_of(content, seed)
    client.expect(spans, whole=True)
    for span in spans:
        assert read(client, span) == expected(content, span)
    assert ends.base.known == ends.base.files.sha256, "complete when the last read returns"


def test_several_threads_read_in_any_order_and_in_parts(ends: Ends, content: dict[str, bytes]) -> None:
    client = ends.client.feed(0)
    spans = spans_of(content)
    client.expect(spans, whole=True)
    halves = [
        FileSpan(file=span.file, start=start, end=end)
        for span in spans
        for middle in ((span.start + span.end) // 2,)
        for start, end in ((span.start, middle), (middle, span.end))
        if start < end
    ]
    random.Random(1).shuffle(halves)
    with ThreadPoolExecutor(4) as pool:
        for span, data in zip(halves, pool.map(lambda span: read(client, span), halves), strict=True):
            assert data == expected(content, span)


def test_bytes_that_were_not_announced_come_past_a_full_window(ends: Ends, content: dict[str, bytes]) -> None:
    client = ends.client.feed(0)
    client.expect(spans_of(content), whole=True)  # and no one reads them: the window fills up
    for start, end in ((0, 1), (PAGE + 3, 19 * PAGE), (20 * PAGE, 20 * PAGE + 7)):
        span = FileSpan(file="0.safetensors", start=start, end=end)
        with ThreadPoolExecutor(3) as pool:
            for data in pool.map(lambda _, span=span: read(client, span), range(3)):  # type: ignore[misc]
                assert data == expected(content, span)


def test_announced_bytes_that_are_skipped_do_not_block_later_ones(ends: Ends, content: dict[str, bytes]) -> None:
    client = ends.client.feed(0)
    spans = spans_of(content)
    client.expect(spans, whole=True)
    assert read(client, spans[-1]) == expected(content, spans[-1])
    assert read(client, spans[0]) == expected(content, spans[0])


def test_a_second_pass_reads_what_it_needs_and_no_more(ends: Ends, content: dict[str, bytes], tmp_path: Path) -> None:
    client = ends.client.feed(0)
    for spans in (spans_of(content), spans_of(content, 1)[3:6]):
        client.expect(spans, whole=True)
        assert [read(client, span) for span in spans] == [expected(content, span) for span in spans]
    assert ends.base.are_complete


def test_a_new_expectation_replaces_one_in_progress(ends: Ends, content: dict[str, bytes]) -> None:
    client = ends.client.feed(0)
    for seed in range(6):
        spans = spans_of(content, seed)
        client.expect(spans, whole=True)
        for span in spans[: 5 if seed < 5 else None]:
            assert read(client, span) == expected(content, span)
    assert ends.base.are_complete


@pytest.mark.parametrize("is_the_same", [True, False])
def test_what_is_prefetched_fills_the_window_and_is_read_once(
    is_the_same: bool, ends: Ends, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, spans, pieces = ends.client.feed(0), spans_of(content), list[str]()
    own = ends.base.files.read

    def count_and_read(file: str, start: int, into: memoryview) -> None:
        pieces.append(f"{file} {start}")
        own(file, start, into)

    monkeypatch.setattr(ends.base.files, "read", count_and_read)
    for _ in range(2):
        client.expect(spans, whole=True, is_due=False)
    wait_until(lambda: len(pieces) == 4)  # all slots
    aside = FileSpan(file="2.safetensors", start=9 * PAGE - 5, end=9 * PAGE)
    assert read(client, aside) == expected(content, aside)  # the last bytes
    assert len(pieces) == 5, "they wait for the pass"
    if not is_the_same:
        spans = spans[1:]
    client.expect(spans, whole=True)
    assert [read(client, span) for span in spans] == [expected(content, span) for span in spans]
    assert ends.base.are_complete
    read_twice = len(pieces) - len(set(pieces))
    assert (read_twice <= 1) is is_the_same, pieces  # the last piece, for the read before the pass


def test_a_prefetch_that_fails_fails_the_pass(
    ends: Ends, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise SourceError("the mount is gone")

    client, spans = ends.client.feed(0), spans_of(content)
    monkeypatch.setattr(ends.base.files, "read", fail)
    client.expect(spans, whole=True, is_due=False)
    client.expect(spans, whole=True)
    with pytest.raises(SourceError, match="mount"):
        read(client, spans[0])


def test_expectations_that_are_replaced_leave_no_threads(ends: Ends, content: dict[str, bytes]) -> None:
    """The worker may list what it expects again and again, and release nothing."""
    client = ends.client.feed(0)
    client.expect(spans_of(content), whole=True)
    read(client, FileSpan(file="0.safetensors", start=0, end=1))
    before = threading.active_count()
    for _ in range(2, 40):
        client.expect([FileSpan(file="2.safetensors", start=0, end=PAGE)], whole=True)
    wait_until(lambda: threading.active_count() <= before)


def test_replaced_expectations_whose_reads_hang_leave_a_thread_for_each_slot(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = threading.Event()
    client = ends.client.feed(0)
    before = threading.active_count()
    monkeypatch.setattr(ends.base.files, "read", lambda *_: may_end.wait())
    for _ in range(1, 40):
        client.expect([FileSpan(file="2.safetensors", start=0, end=PAGE)], whole=True)
    slots, last = 4, read_ahead.CONNECTIONS + 1
    wait_until(lambda: threading.active_count() <= before + slots + last)
    may_end.set()


def test_a_file_with_another_digest_never_finishes(ends: Ends, content: dict[str, bytes], tmp_path: Path) -> None:
    spans = spans_of(content)
    data = bytearray(content["2.safetensors"])
    data[0] ^= 1
    (tmp_path / "2.safetensors").write_bytes(data)
    client = ends.client.feed(0)
    client.expect(spans, whole=True)
    with pytest.raises(SourceError):
        read_all(client, spans)
    with pytest.raises(SourceError):
        read(client, spans[-1])
    assert not ends.base.are_complete


@pytest.mark.attempt("S09b", "a second read gets other bytes", "refused")
def test_bytes_that_differ_when_they_are_read_again_are_refused(
    ends: Ends, content: dict[str, bytes], tmp_path: Path
) -> None:
    client = ends.client.feed(0)
    spans = spans_of(content)
    client.expect(spans, whole=True)
    for span in spans:
        read(client, span)
    data = bytearray(content["0.safetensors"])
    data[PAGE] ^= 1
    (tmp_path / "0.safetensors").write_bytes(data)
    assert read(client, FileSpan(file="0.safetensors", start=5, end=PAGE)) == content["0.safetensors"][5:PAGE]
    with pytest.raises(SourceError):
        read(client, FileSpan(file="0.safetensors", start=PAGE + 5, end=PAGE + 6))


def test_a_file_that_is_cut_off_is_an_error_for_both_kinds_of_reads(
    ends: Ends, content: dict[str, bytes], tmp_path: Path
) -> None:
    os.truncate(tmp_path / "2.safetensors", 3 * PAGE)
    client = ends.client.feed(0)
    with pytest.raises(SourceError):
        read(client, FileSpan(file="2.safetensors", start=0, end=9 * PAGE))
    client.expect(spans_of(content), whole=True)
    with pytest.raises(SourceError):
        read_all(client, spans_of(content))


def test_another_base_may_be_opened_while_one_is_read_ahead(ends: Ends, content: dict[str, bytes]) -> None:
    for _ in range(3):
        client = ends.client.feed(0)
        client.expect(spans_of(content), whole=True)
    assert read(client, SPAN) == expected(content, SPAN)


@pytest.mark.parametrize("is_expected", [False, True])
def test_a_read_that_fails_in_the_worker_keeps_no_line(
    is_expected: bool, ends: Ends, content: dict[str, bytes]
) -> None:
    client = ends.client.feed(0)
    span = FileSpan(file="0.safetensors", start=0, end=20 * PAGE)
    for _ in range(8):
        client.expect([span] if is_expected else [], whole=True)
        with pytest.raises((BufferError, TypeError)):
            client.read(span.file, span.start, memoryview(bytes(20 * PAGE)))  # it cannot be written to
    assert read(client, span) == expected(content, span)


def test_a_base_that_cannot_be_opened_is_an_error(ends: Ends) -> None:
    def refuse(_: int) -> FedBase:
        raise SourceError("no such mount")

    ends.service._open_base = refuse
    with pytest.raises(SourceError, match="no such mount"):
        ends.client.feed(0)
    with pytest.raises(SourceError, match="no such mount"):
        ends.client.feed(1)


def test_a_service_that_ends_is_an_error_and_no_hang(ends: Ends, content: dict[str, bytes]) -> None:
    client = ends.client.feed(0)
    client.expect(spans_of(content), whole=True)
    waiting = threading.Timer(0.2, ends.service.close)
    waiting.start()
    with pytest.raises(SourceError):
        read_all(client, itertools.repeat(FileSpan(file="0.safetensors", start=0, end=20 * PAGE)))


def test_nothing_is_read_for_nothing(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends.base.files, "read", lambda *_: pytest.fail("it was read"))
    client = ends.client.feed(0)
    client.expect([], whole=True)
    client.expect([FileSpan(file="0.safetensors", start=1, end=1)], whole=False)
    client.read("0.safetensors", 0, memoryview(b"").cast("B"))


def test_a_directory_aside_is_read_next_to_a_base(ends: Ends, content: dict[str, bytes]) -> None:
    client, aside, spans = ends.client.feed(0), ParentFeed(ends.client, 1, is_aside=True), spans_of(content)
    client.expect(spans, whole=True)
    aside.expect(spans[:1], whole=False)
    aside.expect(spans[:1], whole=False, is_due=False)
    for span in spans:
        assert read(client, span) == expected(content, span)
    assert read(aside, spans[0]) == expected(content, spans[0])
    assert ends.base.are_complete, "what was expected of the base was not replaced"


# --- models ----------------------------------------------------------------------------------------------------------

TENSOR = StoredTensor(name="a", dtype="BF16", shape=(2, 3))


def test_a_plan_gets_the_files_and_what_is_written_is_in_them(ends: Ends) -> None:
    client = ends.client

    def write(task: int) -> None:
        files = client.plan(task, [TENSOR])
        files.write("a", 0, memoryview(bytes([task]) * 12))
        client.finish(task, files.checksums, "{}", None)
        files.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    wait_until(lambda: not open_files(ends.publisher.directory))
    calls = ends.publisher.calls
    for task in range(4):
        content = bytes([task]) * 12
        assert (ends.publisher.directory / f"{task} model.safetensors").read_bytes().endswith(content)
        message = PublicationWritten(task=task, checksums=(("a", zlib.crc32(content)),))
        assert calls.index((task, (TENSOR,))) < calls.index(message)
    assert len(calls) == 8


def open_files(directory: Path) -> int:
    """How many files in a directory this process, which has both ends, has open."""
    links = (os.path.realpath(link) for link in Path("/proc/self/fd").iterdir())
    return sum(link.startswith(str(directory)) for link in links)


def test_more_files_come_than_fit_into_one_message(ends: Ends) -> None:
    ends.publisher.names = tuple(map(str, range(300)))
    files = ends.client.plan(0, [TENSOR])
    wait_until(lambda: open_files(ends.publisher.directory) == 300)
    files.write("a", 0, memoryview(b"x" * 12))
    files.close()
    assert not open_files(ends.publisher.directory)
    assert all(path.read_bytes().endswith(b"x" * 12) for path in ends.publisher.directory.iterdir())


def test_files_that_do_not_all_arrive_are_an_error(ends: Ends) -> None:
    """As if the process may not open as many."""
    ends.publisher.names = ("0", "1", "2")
    for line in ends.of_worker:
        line._most_files = 1
    with pytest.raises(SourceError, match="3 more files"):
        ends.client.plan(0, [TENSOR])
    wait_until(lambda: not open_files(ends.publisher.directory))


def test_a_refusal_arrives(ends: Ends) -> None:
    refusal = NotJudged(message="no")
    ends.client.finish(3, {}, "{}", refusal)
    assert ends.publisher.calls == [PublicationWritten(task=3, refusal=refusal)]
    ends.publisher.names = ("refused",)
    with pytest.raises(SourceError, match="full"):
        ends.client.plan(3, [TENSOR])


def test_a_service_that_is_gone_is_an_error(ends: Ends) -> None:
    ends.client.plan(0, [TENSOR]).close()
    ends.service.close()
    for call in (lambda: ends.client.plan(0, [TENSOR]), lambda: ends.client.finish(0, {}, "{}", None)):
        with pytest.raises(EngineError):
            call()


@pytest.mark.attempt("F15", "the worker passes open files to the run", "they are closed")
def test_the_parent_takes_no_files(ends: Ends, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with other.open("wb") as file:
        ends.of_worker[0].send(PublicationWritten(task=0), [file.fileno()] * 300)
    assert ends.of_worker[0].receive() == Answer()
    assert not open_files(other)


# --- a worker that is not the gate's ---------------------------------------------------------------------------------

SPAN = FileSpan(file="0.safetensors", start=0, end=PAGE)


def request_(file: str, start: int, end: int) -> BytesRequested:
    return BytesRequested(group=0, span=FileSpan(file=file, start=start, end=end))


def expectation(*spans: object) -> SpansExpected:
    return SpansExpected(group=0, spans=spans, whole=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "message",
    [
        request_("../secret", 0, 1),
        request_("0.safetensors", 0, SIZES[0] + 1),
        request_("0.safetensors", -1, 1),
        expectation(SPAN, FileSpan(file="x", start=0, end=1)),
        PublicationPlanned(task=4, tensors=()),
        PublicationPlanned(task=3, tensors=("a",)),  # type: ignore[arg-type]
        PublicationPlanned(task=3, tensors=(StoredTensor(name="a", dtype="BF16", shape=(-1,)),)),
        PublicationPlanned(task=3, tensors=(StoredTensor(name="a", dtype="BF16", shape=(1,) * 65),)),
        PublicationPlanned(task=3, tensors=(StoredTensor(name="a", dtype="BF16", shape=(1 << 48,)),)),
        PublicationPlanned(task=3, tensors=(TENSOR,) * (MOST_TENSORS + 1)),
        PublicationWritten(task=4),
        PublicationWritten(task=3, checksums=("a",)),  # type: ignore[arg-type]
        PublicationWritten(task=3, checksums=(("a", "b"),)),  # type: ignore[arg-type]
        PublicationWritten(task=3, checksums=(("a", 1),) * (MOST_TENSORS + 1)),
        PublicationWritten(task=3, settings=b"{}"),  # type: ignore[arg-type]
        Answer(),
        Idle(),
    ],
    ids=lambda message: str(message)[:60],
)
def test_a_call_that_the_gate_never_makes_ends_the_service(ends: Ends, message: object) -> None:
    assert ends.call(PublicationPlanned(task=3, tensors=(TENSOR,))) == Answer(files=1)
    with pytest.raises((EOFError, OSError)):
        ends.call(message)
    ends.service.close()
    assert ends.publisher.calls == [(3, (TENSOR,))]


def test_a_run_that_publishes_nothing_takes_no_tensors(ends: Ends) -> None:
    ends.service._publisher = None
    with pytest.raises((EOFError, OSError)):
        ends.call(PublicationWritten(task=3))


def test_the_memory_of_a_line_keeps_its_size(ends: Ends) -> None:
    """Otherwise, the parent would get a SIGBUS."""
    for line in ends.of_worker:
        for size_bytes in (0, 2 * PIECE_BYTES):
            with pytest.raises(PermissionError):
                os.ftruncate(line.window, size_bytes)


# --- a parent that is gone, or that sends something else -------------------------------------------------------------


@pytest.fixture
def parent() -> Iterator[tuple[Line, ParentFeed]]:
    """The other end of a client, which a test plays."""
    own, other = Line.pair()
    yield own, ParentFeed(CallClient([other]), 0)
    for line in (own, other):
        line.close()


def test_a_parent_that_ends_while_bytes_are_awaited_is_an_error(parent: tuple[Line, ParentFeed]) -> None:
    ending = threading.Timer(0.2, parent[0].hang_up)
    ending.start()
    for _ in range(2):
        with pytest.raises(SourceError):
            read(parent[1], SPAN)


@pytest.mark.parametrize("message", [Idle(), "answer"])
def test_a_parent_that_sends_something_else_is_an_error(message: object, parent: tuple[Line, ParentFeed]) -> None:
    parent[0].send(message)
    with pytest.raises(SourceError):
        read(parent[1], SPAN)


def test_a_read_that_fails_leaves_no_answer_for_the_next_one(ends: Ends, content: dict[str, bytes]) -> None:
    client, own = ends.client.feed(0), ends.base.files.read
    whole = FileSpan(file="0.safetensors", start=0, end=20 * PAGE)

    def fail(file: str, start: int, into: memoryview) -> None:
        if start < PAGE:
            raise SourceError("it is gone")
        own(file, start, into)

    for _ in range(3):
        ends.base.files.read = fail  # type: ignore[method-assign]
        with pytest.raises(SourceError, match="gone"):
            read(client, whole)
        ends.base.files.read = own  # type: ignore[method-assign]
        assert read(client, whole) == expected(content, whole)


# --- the bases of a run ----------------------------------------------------------------------------------------------


def group(directory: Path, **files: Any) -> Group:
    key = BaseKey(model="base", revision=None, dtype="auto", quantization=Quantization.NONE)
    return Group(base=key, directory=str(directory), files=BaseFiles(directory=str(directory), **files), tasks=())


def test_a_base_is_opened_once_and_reported_when_it_has_passed(tmp_path: Path, content: dict[str, bytes]) -> None:
    seen: list[tuple[str, Mapping[str, str]]] = []
    feeds = Feeds(on_complete=lambda directory, _, known: seen.append((directory, dict(known))))
    base = feeds.open(group(tmp_path, weights=tuple(content)))
    assert feeds.open(group(tmp_path)) is base
    both = Ends(base, tmp_path)
    client, spans = both.client.feed(0), spans_of(content)
    client.expect(spans, whole=True)
    read_all(client, spans)
    assert read(client, SPAN) == expected(content, SPAN)
    both.close()
    assert seen == [(str(tmp_path), {name: hashlib.sha256(data).hexdigest() for name, data in content.items()})]


def test_no_stub_is_read_as_a_local_file(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        Feeds().open(group(tmp_path, weights=("model.safetensors",), is_streamed=True))


def test_a_directory_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        Feeds().open(group(tmp_path / "gone", weights=("model.safetensors",)))


def test_an_unexpected_error_of_a_read_reaches_the_worker(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    client = ends.client.feed(0)
    monkeypatch.setattr(ends.base.files, "read", lambda *_: 1 / 0)
    with pytest.raises(SourceError, match="ZeroDivisionError"):
        read(client, SPAN)


def test_the_window_is_bounded_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for free_bytes, slots in ((None, 12), (1 << 30, 12), (4 << 30, 32), (5 << 30, 32), (1800 << 20, 14)):
        monkeypatch.setattr(call_service.MemoryGroup, "free_bytes", lambda _, free_bytes=free_bytes: free_bytes)
        assert call_service._slots() == slots
