"""Both ends of the feed, connected in one process: whatever is read in whatever order has the bytes of the files."""

from __future__ import annotations

import hashlib
import itertools
import mmap
import os
import random
import socket
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from merge_gate.sources import digests, read_ahead
from merge_gate.sources.feed import FileSpan, SourceError
from merge_gate.sources.local_files import LocalFiles
from merge_gate.worker import feed_client, feed_service
from merge_gate.worker.channel import Channel
from merge_gate.worker.feed_client import FeedClient
from merge_gate.worker.feed_service import FedBase, FeedService
from merge_gate.worker.protocol import BytesRequested, FeedEnded, FeedOpened, Idle, SlotReleased, SpansExpected

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
        self.service = FeedService(own, lambda _: self.base, poison=True)
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
    service = FeedService(own, lambda _: FedBase(LocalFiles(str(tmp_path), list(content))))
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
    service = FeedService(own, lambda _: pytest.fail("not opened"))
    service.start()
    channel = Channel(other)
    channel.send(BytesRequested(number=number, span=SPAN))
    with pytest.raises((EOFError, OSError)):
        channel.receive(10)
    service.close()
    channel.close()
