"""Reads of a fed base have the bytes of its files, and a worker that is not the gate's gets no others."""

import hashlib
import itertools
import mmap
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from merge_gate._internal.errors import SourceError
from merge_gate.features.stream.feature import StreamedBases
from merge_gate.features.stream.feed_service import FeedService, slots
from merge_gate.features.stream.read_ahead import CONNECTIONS, FedBase, LocalFiles
from merge_gate.records.files import BaseFiles, FileSpan
from merge_gate.records.terms import BaseKey, Quantization
from merge_gate.worker.call_client import CallClient
from merge_gate.worker.channel import LEAST, CallChannel
from merge_gate.worker.parent_feed import BytesRequested, ParentFeed, SpansExpected
from merge_gate.worker.protocol import Answer, Group, Idle, Job
from tests.support.call_ends import Ends, wait_until

pytestmark = pytest.mark.usefixtures("small_pieces")

PAGE = mmap.PAGESIZE // 2
"""Of a chunk; a piece has two."""

SIZES = (20 * PAGE + 7, 1, 9 * PAGE)
SLOTS = 4


@pytest.fixture
def content(tmp_path: Path) -> dict[str, bytes]:
    numbers = random.Random(3)
    written = {f"{number}.safetensors": numbers.randbytes(size) for number, size in enumerate(SIZES)}
    for name, data in written.items():
        (tmp_path / name).write_bytes(data)
    return written


class Fed(Ends):
    """`base` is what the parent reads, as each group of the job."""

    def __init__(self, base: FedBase) -> None:
        self.base, self.service = base, FeedService(lambda _: self.base, SLOTS)
        super().__init__(self.service)

    def feed(self, group: int) -> ParentFeed:
        return ParentFeed(self.client, group).begin()


@pytest.fixture
def ends(tmp_path: Path, content: dict[str, bytes]) -> Iterator[Fed]:
    files = LocalFiles(str(tmp_path), list(content))
    files.sha256 = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    both = Fed(FedBase(files))
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


def expected(content: dict[str, bytes], span: FileSpan) -> bytes:
    return content[span.file][span.start : span.end]


@pytest.mark.parametrize("seed", range(4))
def test_spans_that_are_read_in_order_have_the_files_bytes(seed: int, ends: Fed, content: dict[str, bytes]) -> None:
    client = ends.feed(0)
    spans = spans_of(content, seed)
    client.expect(spans, whole=True)
    for span in spans:
        assert read(client, span) == expected(content, span)
    assert ends.base.known == ends.base.files.sha256, "complete when the last read returns"


def test_several_threads_read_in_any_order_and_in_parts(ends: Fed, content: dict[str, bytes]) -> None:
    client = ends.feed(0)
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


def test_bytes_that_were_not_announced_come_past_a_full_window(ends: Fed, content: dict[str, bytes]) -> None:
    client = ends.feed(0)
    client.expect(spans_of(content), whole=True)  # and no one reads them: the window fills up
    for start, end in ((0, 1), (PAGE + 3, 19 * PAGE), (20 * PAGE, 20 * PAGE + 7)):
        span = FileSpan(file="0.safetensors", start=start, end=end)
        with ThreadPoolExecutor(3) as pool:
            for data in pool.map(lambda _, span=span: read(client, span), range(3)):  # type: ignore[misc]
                assert data == expected(content, span)


def test_a_second_pass_reads_what_it_needs_and_no_more(ends: Fed, content: dict[str, bytes], tmp_path: Path) -> None:
    client = ends.feed(0)
    for spans in (spans_of(content), spans_of(content, 1)[3:6]):
        client.expect(spans, whole=True)
        assert [read(client, span) for span in spans] == [expected(content, span) for span in spans]
    assert ends.base.are_complete


def test_a_new_expectation_replaces_one_in_progress(ends: Fed, content: dict[str, bytes]) -> None:
    client = ends.feed(0)
    for seed in range(6):
        spans = spans_of(content, seed)
        client.expect(spans, whole=True)
        for span in spans[: 5 if seed < 5 else None]:
            assert read(client, span) == expected(content, span)
    assert ends.base.are_complete


@pytest.mark.parametrize("is_the_same", [True, False])
def test_what_is_prefetched_fills_the_window_and_is_read_once(
    is_the_same: bool, ends: Fed, content: dict[str, bytes]
) -> None:
    client, spans, pieces = ends.feed(0), spans_of(content), list[str]()
    own = ends.base.files.read

    def count_and_read(file: str, start: int, into: memoryview) -> None:
        pieces.append(f"{file} {start}")
        own(file, start, into)

    ends.base.files.read = count_and_read
    for _ in range(2):
        client.expect(spans, whole=True, needed_now=False)
    wait_until(lambda: len(pieces) == SLOTS)
    aside = FileSpan(file="2.safetensors", start=9 * PAGE - 5, end=9 * PAGE)
    assert read(client, aside) == expected(content, aside)  # the last bytes
    assert len(pieces) == SLOTS + 1, "they wait for the pass"
    if not is_the_same:
        spans = spans[1:]
    client.expect(spans, whole=True)
    assert [read(client, span) for span in spans] == [expected(content, span) for span in spans]
    assert ends.base.are_complete
    read_twice = len(pieces) - len(set(pieces))
    assert (read_twice <= 1) is is_the_same, pieces  # the last piece, for the read before the pass


def test_a_prefetch_that_fails_fails_the_pass(ends: Fed, content: dict[str, bytes]) -> None:
    def fail(*_: object) -> None:
        raise SourceError("the mount is gone")

    client, spans = ends.feed(0), spans_of(content)
    ends.base.files.read = fail
    client.expect(spans, whole=True, needed_now=False)
    client.expect(spans, whole=True)
    with pytest.raises(SourceError, match="mount"):
        read(client, spans[0])


@pytest.mark.parametrize("hangs", [False, True])
def test_expectations_that_are_replaced_leave_no_threads(hangs: bool, ends: Fed, content: dict[str, bytes]) -> None:
    """The worker may list what it expects again and again, and release nothing. A read that hangs keeps its thread."""
    may_end, client, most = threading.Event(), ends.feed(0), 0
    if hangs:
        ends.base.files.read = lambda *_: may_end.wait()
        most = SLOTS + CONNECTIONS + 1  # the slots, and the last pass
    else:
        client.expect(spans_of(content), whole=True)
        read(client, FileSpan(file="0.safetensors", start=0, end=1))
    before = threading.active_count()
    for _ in range(40):
        client.expect([FileSpan(file="2.safetensors", start=0, end=PAGE)], whole=True)
    wait_until(lambda: threading.active_count() <= before + most)
    may_end.set()


def test_a_file_with_another_digest_never_finishes(ends: Fed, content: dict[str, bytes], tmp_path: Path) -> None:
    spans = spans_of(content)
    data = bytearray(content["2.safetensors"])
    data[0] ^= 1
    (tmp_path / "2.safetensors").write_bytes(data)
    client = ends.feed(0)
    client.expect(spans, whole=True)
    with pytest.raises(SourceError):
        read_all(client, spans)
    with pytest.raises(SourceError):
        read(client, spans[-1])
    assert not ends.base.are_complete


@pytest.mark.attempt("S09b", "a second read gets other bytes", "refused")
def test_bytes_that_differ_when_they_are_read_again_are_refused(
    ends: Fed, content: dict[str, bytes], tmp_path: Path
) -> None:
    client = ends.feed(0)
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


def test_a_file_that_is_cut_off_is_an_error_for_all_reads(ends: Fed, content: dict[str, bytes], tmp_path: Path) -> None:
    os.truncate(tmp_path / "2.safetensors", 3 * PAGE)
    client = ends.feed(0)
    with pytest.raises(SourceError):
        read(client, FileSpan(file="2.safetensors", start=0, end=9 * PAGE))
    client.expect(spans_of(content), whole=True)
    with pytest.raises(SourceError):
        read_all(client, spans_of(content))


@pytest.mark.parametrize("is_expected", [False, True])
def test_a_read_that_fails_in_the_worker_keeps_no_line(is_expected: bool, ends: Fed, content: dict[str, bytes]) -> None:
    client = ends.feed(0)
    span = FileSpan(file="0.safetensors", start=0, end=20 * PAGE)
    for _ in range(8):
        client.expect([span] if is_expected else [], whole=True)
        with pytest.raises((BufferError, TypeError)):
            client.read(span.file, span.start, memoryview(bytes(20 * PAGE)))  # it cannot be written to
    assert read(client, span) == expected(content, span)


def test_a_base_that_cannot_be_opened_is_an_error(ends: Fed) -> None:
    def refuse(_: int) -> FedBase:
        raise SourceError("no such mount")

    ends.service._open_base = refuse
    with pytest.raises(SourceError, match="no such mount"):
        ends.feed(0)
    with pytest.raises(SourceError, match="no such mount"):
        ends.feed(1)


def test_a_service_that_ends_is_an_error_and_no_hang(ends: Fed, content: dict[str, bytes]) -> None:
    client = ends.feed(0)
    client.expect(spans_of(content), whole=True)
    waiting = threading.Timer(0.2, ends.end)
    waiting.start()
    with pytest.raises(SourceError):
        read_all(client, itertools.repeat(FileSpan(file="0.safetensors", start=0, end=20 * PAGE)))


def test_nothing_is_read_for_nothing(ends: Fed) -> None:
    ends.base.files.read = lambda *_: pytest.fail("it was read")
    client = ends.feed(0)
    client.expect([], whole=True)
    client.expect([FileSpan(file="0.safetensors", start=1, end=1)], whole=False)
    client.read("0.safetensors", 0, memoryview(b"").cast("B"))


def test_a_directory_aside_is_read_next_to_a_base(ends: Fed, content: dict[str, bytes]) -> None:
    client, aside, spans = ends.feed(0), ParentFeed(ends.client, 1, is_aside=True), spans_of(content)
    client.expect(spans, whole=True)
    aside.expect(spans[:1], whole=False)
    aside.expect(spans[:1], whole=False, needed_now=False)
    for span in spans:
        assert read(client, span) == expected(content, span)
    assert read(aside, spans[0]) == expected(content, spans[0])
    assert ends.base.are_complete, "what was expected of the base was not replaced"


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
        Answer(),
        Idle(),
    ],
    ids=lambda message: str(message)[:60],
)
def test_a_call_that_the_gate_never_makes_ends_the_service(ends: Ends, message: object) -> None:
    assert ends.call(expectation(SPAN)) == Answer()
    for _ in range(2):
        with pytest.raises((EOFError, OSError)):
            ends.call(message)


@pytest.mark.parametrize(
    "message",
    [
        BytesRequested(group="0", span=SPAN),  # type: ignore[arg-type]
        BytesRequested(group=0, span=None),  # type: ignore[arg-type]
        request_("0.safetensors", 0, "1"),  # type: ignore[arg-type]
        expectation(None),
        SpansExpected(group=0, spans=None, whole=True),  # type: ignore[arg-type]
    ],
    ids=lambda message: str(message)[:60],
)
def test_a_call_with_fields_of_other_types_is_refused(message: object, tmp_path: Path, content: object) -> None:
    service = feeds().service(Job(groups=(group(tmp_path, weights=("0.safetensors",)),)))
    assert service is not None
    ends = Ends(service)
    with pytest.raises((EOFError, OSError)):
        ends.call(message)
    ends.close()


# --- a parent that is gone, or that sends something else -------------------------------------------------------------


@pytest.fixture
def parent() -> Iterator[tuple[CallChannel, ParentFeed]]:
    """The other end of a client, which a test plays."""
    own, other = CallChannel.pair(SpansExpected | BytesRequested, LEAST)
    yield own, ParentFeed(CallClient([other]), 0)
    for line in (own, other):
        line.close()


def test_a_parent_that_ends_while_bytes_are_awaited_is_an_error(parent: tuple[CallChannel, ParentFeed]) -> None:
    ending = threading.Timer(0.2, parent[0].hang_up)
    ending.start()
    for _ in range(2):
        with pytest.raises(SourceError):
            read(parent[1], SPAN)


@pytest.mark.parametrize("message", [Idle(), "answer"])
def test_a_parent_that_sends_something_else_is_an_error(
    message: object, parent: tuple[CallChannel, ParentFeed]
) -> None:
    parent[0].send(message)
    with pytest.raises(SourceError):
        read(parent[1], SPAN)


def test_a_read_that_fails_leaves_no_answer_for_the_next_one(ends: Fed, content: dict[str, bytes]) -> None:
    client, own = ends.feed(0), ends.base.files.read
    whole = FileSpan(file="0.safetensors", start=0, end=20 * PAGE)

    def fail(file: str, start: int, into: memoryview) -> None:
        if start < PAGE:
            raise SourceError("it is gone")
        own(file, start, into)

    for _ in range(3):
        ends.base.files.read = fail
        with pytest.raises(SourceError, match="gone"):
            read(client, whole)
        ends.base.files.read = own
        assert read(client, whole) == expected(content, whole)


# --- the bases of a run ----------------------------------------------------------------------------------------------


def group(directory: Path, **files: Any) -> Group:
    key = BaseKey(model="base", revision=None, dtype="auto", quantization=Quantization.NONE)
    return Group(
        base=key, directory=str(directory), files=BaseFiles(directory=str(directory), **files), fed=True, tasks=()
    )


def feeds(passed: Callable[..., None] = lambda *_: None) -> StreamedBases:
    run: Any = SimpleNamespace(watch=SimpleNamespace(read_whole=passed))
    return StreamedBases(run)


def test_a_base_is_opened_once_and_reported_when_it_has_passed(tmp_path: Path, content: dict[str, bytes]) -> None:
    seen: list[tuple[str, Mapping[str, str]]] = []
    of_run = feeds(lambda directory, _, known: seen.append((directory, dict(known))))
    base = of_run.open(group(tmp_path, weights=tuple(content)))
    assert of_run.open(group(tmp_path)) is base
    both = Fed(base)
    client, spans = both.feed(0), spans_of(content)
    client.expect(spans, whole=True)
    read_all(client, spans)
    assert read(client, SPAN) == expected(content, SPAN)
    both.close()
    assert seen == [(str(tmp_path), {name: hashlib.sha256(data).hexdigest() for name, data in content.items()})]


def test_no_stub_is_read_as_a_local_file(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        feeds().open(group(tmp_path, weights=("model.safetensors",), is_streamed=True))


def test_a_directory_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        feeds().open(group(tmp_path / "gone", weights=("model.safetensors",)))


def test_an_unexpected_error_of_a_read_reaches_the_worker(ends: Fed) -> None:
    client = ends.feed(0)
    ends.base.files.read = lambda *_: 1 / 0
    with pytest.raises(SourceError, match="ZeroDivisionError"):
        read(client, SPAN)


@pytest.mark.parametrize(
    ("free_bytes", "count"), [(None, 12), (1 << 30, 12), (4 << 30, 32), (5 << 30, 32), (1800 << 20, 14)]
)
def test_the_window_is_bounded_on_both_sides(free_bytes: int | None, count: int) -> None:
    assert slots(free_bytes) == count


def test_a_job_without_fed_bases_asks_for_no_service(tmp_path: Path) -> None:
    local = replace(group(tmp_path), fed=False)
    assert feeds().service(Job(groups=(local,))) is None
    assert feeds().service(Job(groups=(local, group(tmp_path)))) is not None
