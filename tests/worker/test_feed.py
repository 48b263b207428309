"""Both ends of the feed, connected in one process: whatever is read in whatever order has the bytes of the files."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import mmap
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from merge_gate.records.files import BaseFiles
from merge_gate.records.terms import BaseKey, Quantization
from merge_gate.sources import digests, read_ahead
from merge_gate.sources.feed import FileSpan, SourceError
from merge_gate.sources.local_files import LocalFiles
from merge_gate.sources.window import Window
from merge_gate.worker import feed_client, feed_service
from merge_gate.worker.channel import Channel
from merge_gate.worker.feed_client import FeedClient
from merge_gate.worker.feed_service import FedBase, Feeds
from merge_gate.worker.protocol import (
    BytesRequested,
    FeedEnded,
    FeedOpened,
    Group,
    Idle,
    PieceArrived,
    SlotReleased,
    SpansExpected,
)
from tests.support.checked_slots import CheckedFeedService

PAGE = mmap.PAGESIZE
SIZES = (20 * PAGE + 7, 1, 9 * PAGE)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (read_ahead, feed_client, feed_service):
        monkeypatch.setattr(module, "PIECE_BYTES", 2 * PAGE)
    monkeypatch.setattr(digests, "CHUNK_BYTES", PAGE)
    monkeypatch.setattr(feed_service, "CONNECTIONS", 3)
    monkeypatch.setattr(feed_service, "_slots", lambda: 4)


@pytest.fixture
def content(tmp_path: Path) -> dict[str, bytes]:
    numbers = random.Random(3)
    written = {f"{number}.safetensors": numbers.randbytes(size) for number, size in enumerate(SIZES)}
    for name, data in written.items():
        (tmp_path / name).write_bytes(data)
    return written


class Ends:
    """Both ends: `base` is what the parent reads."""

    def __init__(self, base: FedBase) -> None:
        self.base = base
        own, other = socket.socketpair()
        self.service = CheckedFeedService(own, lambda _: self.base)
        self.service.start()
        self.client = FeedClient(other)


@pytest.fixture
def ends(tmp_path: Path, content: dict[str, bytes]) -> Iterator[Ends]:
    files = LocalFiles(str(tmp_path), list(content))
    files.sha256 = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    both = Ends(FedBase(files))
    yield both
    both.service.close()
    both.client.close()
    assert CheckedFeedService.changed == []


def spans_of(content: dict[str, bytes], seed: int = 0) -> list[FileSpan]:
    """Every file cut at random places, some of them left out."""
    numbers, spans = random.Random(seed), []
    for name, data in content.items():
        cuts = sorted({0, len(data), *(numbers.randrange(len(data)) for _ in range(12))})
        spans += [FileSpan(file=name, start=start, end=end) for start, end in itertools.pairwise(cuts)]
    return [span for span in spans if numbers.random() < 0.9 or span.end == len(content[span.file])]


def read(client: FeedClient, span: FileSpan) -> bytes:
    buffer = bytearray(span.end - span.start)
    client.read(span.file, span.start, memoryview(buffer))
    return bytes(buffer)


def read_all(client: FeedClient, spans: Iterable[FileSpan]) -> None:
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
    client = ends.client.open(0)
    spans = spans_of(content, seed)
    client.expect(spans, whole=True)
    for span in spans:
        assert read(client, span) == expected(content, span)
    assert ends.base.digests.known == ends.base.files.sha256, "complete when the last read returns"


def test_several_threads_read_in_any_order_and_in_parts(ends: Ends, content: dict[str, bytes]) -> None:
    client = ends.client.open(0)
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
    client = ends.client.open(0)
    client.expect(spans_of(content), whole=True)  # and no one reads them: the window fills up
    for start, end in ((0, 1), (PAGE + 3, 19 * PAGE), (20 * PAGE, 20 * PAGE + 7)):
        span = FileSpan(file="0.safetensors", start=start, end=end)
        with ThreadPoolExecutor(3) as pool:
            for data in pool.map(lambda _, span=span: read(client, span), range(3)):  # type: ignore[misc]
                assert data == expected(content, span)


def test_announced_bytes_that_are_skipped_do_not_block_later_ones(ends: Ends, content: dict[str, bytes]) -> None:
    client = ends.client.open(0)
    spans = spans_of(content)
    client.expect(spans, whole=True)
    assert read(client, spans[-1]) == expected(content, spans[-1])
    assert read(client, spans[0]) == expected(content, spans[0])


def test_a_second_pass_reads_what_it_needs_and_no_more(ends: Ends, content: dict[str, bytes], tmp_path: Path) -> None:
    client = ends.client.open(0)
    for spans in (spans_of(content), spans_of(content, 1)[3:6]):
        client.expect(spans, whole=True)
        assert [read(client, span) for span in spans] == [expected(content, span) for span in spans]
    assert ends.base.digests.are_complete


def test_a_new_expectation_replaces_one_in_progress(ends: Ends, content: dict[str, bytes]) -> None:
    client = ends.client.open(0)
    for seed in range(6):
        spans = spans_of(content, seed)
        client.expect(spans, whole=True)
        for span in spans[: 5 if seed < 5 else None]:
            assert read(client, span) == expected(content, span)
    assert ends.base.digests.are_complete


@pytest.mark.parametrize("is_the_same", [True, False])
def test_what_is_prefetched_fills_the_window_and_is_read_once(
    is_the_same: bool, ends: Ends, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, spans, pieces = ends.client.open(0), spans_of(content), list[str]()
    own = ends.base.files.read

    def count_and_read(file: str, start: int, into: memoryview) -> None:
        pieces.append(f"{file} {start}")
        own(file, start, into)

    monkeypatch.setattr(ends.base.files, "read", count_and_read)
    for _ in range(2):
        client.prefetch(spans, whole=True)
    wait_until(lambda: len(client._pieces) == 4)  # all slots
    aside = FileSpan(file="2.safetensors", start=9 * PAGE - 5, end=9 * PAGE)
    assert read(client, aside) == expected(content, aside)  # the last bytes
    assert len(client._pieces) == 4, "they wait for the pass"
    before = len(pieces)
    if not is_the_same:
        spans = spans[1:]
    client.expect(spans, whole=True)
    assert [read(client, span) for span in spans] == [expected(content, span) for span in spans]
    assert ends.base.digests.are_complete
    read_twice = len(pieces) - len(set(pieces))
    assert (read_twice <= 1) is is_the_same, (before, pieces)  # the last piece, for the read before the pass


def test_a_prefetch_that_fails_fails_the_pass(
    ends: Ends, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise SourceError("the mount is gone")

    client, spans = ends.client.open(0), spans_of(content)
    monkeypatch.setattr(ends.base.files, "read", fail)
    client.prefetch(spans, whole=True)
    client.expect(spans, whole=True)
    with pytest.raises(SourceError, match="mount"):
        read(client, spans[0])


def test_expectations_that_are_replaced_leave_no_threads(ends: Ends, content: dict[str, bytes]) -> None:
    """The worker may list what it expects again and again, and release nothing."""
    client = ends.client.open(0)
    client.expect(spans_of(content), whole=True)
    read(client, FileSpan(file="0.safetensors", start=0, end=1))
    before = threading.active_count()
    for number in range(2, 40):
        spans = (FileSpan(file="2.safetensors", start=0, end=PAGE),)
        client._send(SpansExpected(number=number, spans=spans, whole=True))
    wait_until(lambda: threading.active_count() <= before)


def test_replaced_expectations_whose_reads_hang_leave_a_thread_for_each_slot(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = threading.Event()
    client = ends.client.open(0)
    before = threading.active_count()
    monkeypatch.setattr(ends.base.files, "read", lambda *_: may_end.wait())
    for number in range(1, 40):
        spans = (FileSpan(file="2.safetensors", start=0, end=PAGE),)
        client._send(SpansExpected(number=number, spans=spans, whole=True))
    slots, last = 4, feed_service.CONNECTIONS + 1
    wait_until(lambda: threading.active_count() <= before + slots + last)
    may_end.set()


def test_a_file_with_another_digest_never_finishes(ends: Ends, content: dict[str, bytes], tmp_path: Path) -> None:
    spans = spans_of(content)
    data = bytearray(content["2.safetensors"])
    data[0] ^= 1
    (tmp_path / "2.safetensors").write_bytes(data)
    client = ends.client.open(0)
    client.expect(spans, whole=True)
    with pytest.raises(SourceError):
        read_all(client, spans)
    with pytest.raises(SourceError):
        read(client, spans[-1])
    assert not ends.base.digests.are_complete


@pytest.mark.attempt("S09b", "a second read gets other bytes", "refused")
def test_bytes_that_differ_when_they_are_read_again_are_refused(
    ends: Ends, content: dict[str, bytes], tmp_path: Path
) -> None:
    client = ends.client.open(0)
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
    client = ends.client.open(0)
    with pytest.raises(SourceError):
        read(client, FileSpan(file="2.safetensors", start=0, end=9 * PAGE))
    client.expect(spans_of(content), whole=True)
    with pytest.raises(SourceError):
        read_all(client, spans_of(content))


def test_another_base_may_be_opened_while_one_is_read_ahead(ends: Ends, content: dict[str, bytes]) -> None:
    for _ in range(3):
        client = ends.client.open(0)
        client.expect(spans_of(content), whole=True)
    assert read(client, SPAN) == expected(content, SPAN)


@pytest.mark.parametrize("is_expected", [False, True])
def test_a_read_that_fails_in_the_worker_keeps_no_slot(
    is_expected: bool, ends: Ends, content: dict[str, bytes]
) -> None:
    client = ends.client.open(0)
    span = FileSpan(file="0.safetensors", start=0, end=20 * PAGE)
    for _ in range(8):
        client.expect([span] if is_expected else [], whole=True)
        with pytest.raises((BufferError, TypeError)):
            client.read(span.file, span.start, memoryview(bytes(20 * PAGE)))
    assert read(client, span) == expected(content, span)


def test_a_base_that_cannot_be_opened_is_an_error(ends: Ends) -> None:
    def refuse(_: int) -> FedBase:
        raise SourceError("no such mount")

    ends.service._open_base = refuse
    with pytest.raises(SourceError, match="no such mount"):
        ends.client.open(0)
    with pytest.raises(SourceError, match="no such mount"):
        ends.client.open(1)


def test_a_service_that_ends_is_an_error_and_no_hang(ends: Ends, content: dict[str, bytes]) -> None:
    client = ends.client.open(0)
    client.expect(spans_of(content), whole=True)
    waiting = threading.Timer(0.2, ends.service.close)
    waiting.start()
    with pytest.raises(SourceError):
        read_all(client, itertools.repeat(FileSpan(file="0.safetensors", start=0, end=20 * PAGE)))


# --- a worker that is not the gate's ---------------------------------------------------------------------------------

SPAN = FileSpan(file="0.safetensors", start=0, end=PAGE)


@pytest.mark.parametrize(
    "request_",
    [
        BytesRequested(number=-1, span=FileSpan(file="../secret", start=0, end=1)),
        BytesRequested(number=-1, span=FileSpan(file="0.safetensors", start=0, end=SIZES[0] + 1)),
        BytesRequested(number=-1, span=FileSpan(file="0.safetensors", start=-1, end=1)),
        BytesRequested(number=-1, span=FileSpan(file="0.safetensors", start=0, end=2 * PAGE + 1)),
        BytesRequested(number=1, span=SPAN),
        SpansExpected(number=0, spans=(SPAN,), whole=True),
        SpansExpected(number=1, spans=(SPAN, FileSpan(file="x", start=0, end=1)), whole=True),
        SpansExpected(number=1, spans=("0.safetensors",), whole=True),  # type: ignore[arg-type]
        SlotReleased(number=1, start=0),
        Idle(),
    ],
    ids=str,
)
def test_a_request_for_anything_else_ends_the_service(
    request_: object, tmp_path: Path, content: dict[str, bytes]
) -> None:
    own, other = socket.socketpair()
    service = CheckedFeedService(own, lambda _: FedBase(LocalFiles(str(tmp_path), list(content))))
    service.start()
    channel = Channel(other)
    channel.send(FeedOpened(group=0))
    _, descriptors, _, _ = socket.recv_fds(other, 4, 2)
    assert channel.receive(10) == FeedEnded(number=0)
    channel.send(request_)
    with pytest.raises((EOFError, OSError)):
        channel.receive(10)
    service.close()
    channel.close()
    channel.close()
    for descriptor in descriptors:
        os.close(descriptor)


@pytest.mark.parametrize("number", [1, -1])
def test_a_request_before_a_base_is_open_ends_the_service(number: int) -> None:
    own, other = socket.socketpair()
    service = CheckedFeedService(own, lambda _: pytest.fail("not opened"))
    service.start()
    channel = Channel(other)
    channel.send(BytesRequested(number=number, span=SPAN))
    with pytest.raises((EOFError, OSError)):
        channel.receive(10)
    service.close()
    channel.close()


# --- a parent that is gone, or that has another base -----------------------------------------------------------------


class Parent:
    """The other end of a client, which a test plays. It has a window of one page for each kind of read."""

    def __init__(self) -> None:
        self.end, other = socket.socketpair()
        self.channel = Channel(self.end)
        self.client = FeedClient(other)
        self.window = Window(PAGE, 1)

    def open(self) -> None:
        socket.send_fds(self.end, [(1).to_bytes(4, "big")], [self.window.descriptor] * 2)
        self.channel.send(FeedEnded(number=0))
        self.client.open(0)
        assert self.channel.receive(10) == FeedOpened(group=0)

    def close(self) -> None:
        self.end.shutdown(socket.SHUT_RDWR)
        self.channel.close()
        self.client.close()
        self.window.close()


@pytest.fixture
def parent() -> Iterator[Parent]:
    played = Parent()
    yield played
    with contextlib.suppress(OSError):
        played.close()


def test_a_parent_that_ends_before_a_base_is_open_is_an_error(parent: Parent) -> None:
    parent.end.shutdown(socket.SHUT_RDWR)
    with pytest.raises(SourceError):
        parent.client.open(0)


def test_a_parent_that_sends_no_window_is_an_error(parent: Parent) -> None:
    parent.end.sendall(bytes(4))
    with pytest.raises(SourceError):
        parent.client.open(0)


def test_a_parent_that_ends_while_it_opens_a_base_is_an_error(parent: Parent) -> None:
    socket.send_fds(parent.end, [(1).to_bytes(4, "big")], [parent.window.descriptor] * 2)
    ending = threading.Timer(0.2, parent.end.shutdown, (socket.SHUT_RDWR,))
    ending.start()
    with pytest.raises(SourceError):
        parent.client.open(0)


def test_a_parent_that_ends_while_bytes_are_awaited_is_an_error(parent: Parent) -> None:
    parent.open()
    parent.client.expect([SPAN], whole=True)
    ending = threading.Timer(0.2, parent.end.shutdown, (socket.SHUT_RDWR,))
    ending.start()
    with pytest.raises(SourceError):
        read(parent.client, SPAN)
    with pytest.raises(SourceError):
        read(parent.client, FileSpan(file="0.safetensors", start=PAGE, end=PAGE + 1))


def test_a_parent_that_sends_something_else_is_an_error(parent: Parent) -> None:
    parent.open()
    parent.client.expect([SPAN], whole=True)
    parent.channel.send(Idle())
    with pytest.raises(SourceError):
        read(parent.client, SPAN)


def test_a_place_outside_of_the_window_is_an_error(parent: Parent) -> None:
    parent.open()
    parent.client.expect([SPAN], whole=True)
    parent.channel.send(PieceArrived(number=1, span=SPAN, start=PAGE))
    with pytest.raises(SourceError):
        read(parent.client, SPAN)


def test_a_piece_of_an_earlier_expectation_is_released_at_once(parent: Parent) -> None:
    parent.open()
    parent.client.expect([SPAN], whole=True)
    parent.client.expect([SPAN], whole=True)
    parent.channel.send(PieceArrived(number=1, span=SPAN, start=0))
    assert [parent.channel.receive(10) for _ in range(3)][-1] == SlotReleased(number=1, start=0)


def test_nothing_is_sent_for_nothing(parent: Parent) -> None:
    parent.open()
    parent.client.expect([], whole=True)
    parent.client.read("0.safetensors", 0, memoryview(b"").cast("B"))
    assert parent.channel.receive(0.05) is None


def group(directory: Path, **files: Any) -> Group:
    key = BaseKey(model="base", revision=None, dtype="auto", quantization=Quantization.NONE)
    return Group(base=key, directory=str(directory), files=BaseFiles(directory=str(directory), **files), tasks=())


def test_a_base_is_opened_once_and_reported_when_it_has_passed(tmp_path: Path, content: dict[str, bytes]) -> None:
    seen: list[tuple[str, Mapping[str, str]]] = []
    feeds = Feeds(on_complete=lambda directory, _, known: seen.append((directory, dict(known))))
    base = feeds.open(group(tmp_path, weights=tuple(content)))
    assert feeds.open(group(tmp_path)) is base
    both = Ends(base)
    both.client.open(0)
    spans = spans_of(content)
    both.client.expect(spans, whole=True)
    read_all(both.client, spans)
    assert read(both.client, SPAN) == expected(content, SPAN)
    both.service.close()
    both.client.close()
    assert seen == [(str(tmp_path), {name: hashlib.sha256(data).hexdigest() for name, data in content.items()})]


def test_no_stub_is_read_as_a_local_file(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        Feeds().open(group(tmp_path, weights=("model.safetensors",), is_streamed=True))


def test_a_directory_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        Feeds().open(group(tmp_path / "gone", weights=("model.safetensors",)))


def test_an_unexpected_error_of_a_read_reaches_the_worker(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    client = ends.client.open(0)
    monkeypatch.setattr(ends.base.files, "read", lambda *_: 1 / 0)
    with pytest.raises(SourceError, match="ZeroDivisionError"):
        read(client, SPAN)


def test_the_window_is_bounded_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for free_bytes, slots in ((None, 12), (1 << 30, 12), (4 << 30, 32), (5 << 30, 32), (1800 << 20, 14)):
        monkeypatch.setattr(feed_service.MemoryGroup, "free_bytes", lambda _, free_bytes=free_bytes: free_bytes)
        assert feed_service._slots() == slots
