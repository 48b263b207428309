"""Pieces come in order and whole, through few slots, and a slot has one owner at a time."""

from __future__ import annotations

import hashlib
import itertools
import mmap
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import pytest

from merge_gate.sources import digests, read_ahead
from merge_gate.sources.digests import Digests
from merge_gate.sources.feed import FileSpan, SourceError
from merge_gate.sources.read_ahead import MOST_BASE_BYTES, ReadAhead, plan, refuse_excess
from merge_gate.sources.window import Window, WindowSlot

PAGE = mmap.PAGESIZE


class Files:
    """Files in memory, read more or less slowly."""

    def __init__(self, *sizes: int) -> None:
        numbers = random.Random(1)
        self.content = {f"{number}.safetensors": numbers.randbytes(size) for number, size in enumerate(sizes)}
        self.sizes = {name: len(content) for name, content in self.content.items()}
        self.sha256: Mapping[str, str] = {}
        self.delays = random.Random(2)
        self.on_read: Callable[[str, int], None] = lambda _name, _start: None

    def read(self, file: str, start: int, into: memoryview) -> None:
        time.sleep(self.delays.random() / 500)
        self.on_read(file, start)
        into[:] = self.content[file][start : start + len(into)]


class Deliveries:
    """What a `ReadAhead` delivers, in a queue."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[tuple[FileSpan, WindowSlot] | Exception | None] = queue.SimpleQueue()

    def deliver(self, span: FileSpan, slot: WindowSlot) -> None:
        self.queue.put((span, slot))

    def finish(self, error: Exception | None) -> None:
        self.queue.put(error)

    def __iter__(self) -> Iterator[tuple[FileSpan, WindowSlot]]:
        while (delivered := self.queue.get(timeout=20)) is not None:
            if isinstance(delivered, Exception):
                raise delivered
            yield delivered


def release_all(deliveries: Deliveries, window: Window) -> None:
    for _, slot in deliveries:
        window.release(slot)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "PIECE_BYTES", PAGE)
    monkeypatch.setattr(digests, "CHUNK_BYTES", PAGE // 2)


def whole(files: Files) -> tuple[FileSpan, ...]:
    return plan((), files.sizes, known=())


@pytest.mark.parametrize(("connections", "slots"), [(1, 1), (1, 4), (4, 5), (8, 9)])
def test_all_bytes_come_in_order(connections: int, slots: int) -> None:
    files = Files(10 * PAGE + 7, 1, 5 * PAGE)
    window = Window(PAGE, slots, poison=True)
    passed, deliveries = Digests(files.sizes, {}), Deliveries()
    seen = {name: bytearray() for name in files.sizes}
    ahead = ReadAhead(files, whole(files), window, passed, deliveries, connections=connections)
    ahead.start()
    for span, slot in deliveries:
        assert len(seen[span.file]) == span.start
        seen[span.file] += window.view(slot)
        window.release(slot)
    assert seen == files.content
    assert passed.known == {name: hashlib.sha256(content).hexdigest() for name, content in files.content.items()}
    assert ahead.join(10)


def test_no_more_is_read_than_the_window_holds() -> None:
    files, window, deliveries = Files(64 * PAGE), Window(PAGE, 9), Deliveries()
    starts: list[int] = []
    files.on_read = lambda _, start: starts.append(start)
    ahead = ReadAhead(files, whole(files), window, Digests(files.sizes, {}), deliveries, connections=8)
    ahead.start()
    _, slot = next(iter(deliveries))
    time.sleep(0.2)
    assert len(starts) == 9
    window.release(slot)
    ahead.cancel()
    window.close()
    assert ahead.join(10)


def test_an_error_of_a_read_reaches_the_receiver() -> None:
    files, window, deliveries = Files(8 * PAGE), Window(PAGE, 3), Deliveries()

    def broken(_: str, start: int) -> None:
        if start >= 2 * PAGE:
            raise OSError("the line is dead")

    files.on_read = broken
    ahead = ReadAhead(files, whole(files), window, Digests(files.sizes, {}), deliveries, connections=2)
    ahead.start()
    with pytest.raises(OSError, match="dead"):
        release_all(deliveries, window)
    assert ahead.join(10)


def test_canceling_ends_the_threads_and_frees_the_slots() -> None:
    files, window, deliveries = Files(64 * PAGE), Window(PAGE, 5), Deliveries()
    before = threading.active_count()
    ahead = ReadAhead(files, whole(files), window, Digests(files.sizes, {}), deliveries, connections=4)
    ahead.start()
    _, slot = next(iter(deliveries))
    ahead.cancel()
    window.release(slot)
    assert ahead.join(10)
    assert threading.active_count() == before
    while not deliveries.queue.empty():
        delivered = deliveries.queue.get()
        assert isinstance(delivered, tuple)
        window.release(delivered[1])
    assert len([window.acquire(1) for _ in range(5)]) == 5


def test_canceling_ends_threads_that_wait_for_a_slot() -> None:
    """The receiver may keep all slots, so none is ever free."""
    files, window, deliveries = Files(64 * PAGE), Window(PAGE, 3), Deliveries()
    ahead = ReadAhead(files, whole(files), window, Digests(files.sizes, {}), deliveries, connections=2)
    ahead.start()
    kept = [slot for _, slot in itertools.islice(deliveries, 3)]
    assert not ahead.join(0.1)
    ahead.cancel()
    assert ahead.join(10)
    for slot in kept:
        window.release(slot)
    assert len([window.acquire(1) for _ in range(3)]) == 3, "none was lost"


# --- what is read ----------------------------------------------------------------------------------------------------


def span(file: str, start: int, end: int) -> FileSpan:
    return FileSpan(file=file, start=start, end=end)


def test_a_file_without_a_digest_is_read_whole_and_others_where_they_are_needed() -> None:
    sizes = {"a": 3 * PAGE, "b": 10 * PAGE + 1, "c": PAGE}
    pieces = plan(
        [span("b", 10, 20), span("b", 5 * PAGE, 7 * PAGE + 1), span("b", 10 * PAGE, 10 * PAGE + 1)], sizes, "b"
    )
    assert pieces == (
        span("b", 0, PAGE // 2),
        span("b", 5 * PAGE, 6 * PAGE),
        span("b", 6 * PAGE, 7 * PAGE),
        span("b", 7 * PAGE, 7 * PAGE + PAGE // 2),
        span("b", 10 * PAGE, 10 * PAGE + 1),
        *(span("a", place, place + PAGE) for place in range(0, 3 * PAGE, PAGE)),
        span("c", 0, PAGE),
    )


# --- digests ---------------------------------------------------------------------------------------------------------


def added(passed: Digests, content: bytes, starts: list[int]) -> None:
    for start in starts:
        passed.add("a", start, memoryview(content)[start : start + PAGE])


def test_a_file_has_a_digest_once_all_of_its_bytes_passed_in_order() -> None:
    content = os.urandom(3 * PAGE + 1)
    passed = Digests({"a": len(content)}, {})
    added(passed, content, [0, 2 * PAGE, 3 * PAGE])
    assert not passed.are_complete
    added(passed, content, [PAGE, 2 * PAGE])
    passed.begin()
    added(passed, content, [3 * PAGE])
    assert passed.known == {}
    added(passed, content, [0, PAGE, 2 * PAGE, 3 * PAGE])
    assert passed.known == {"a": hashlib.sha256(content).hexdigest()}
    assert passed.are_complete


def test_a_digest_that_is_not_the_expected_one_is_an_error() -> None:
    content = os.urandom(2 * PAGE)
    passed = Digests({"a": len(content)}, {"a": hashlib.sha256(content[::-1]).hexdigest()})
    with pytest.raises(SourceError):
        added(passed, content, [0, PAGE])
    assert not passed.are_complete


def test_bytes_that_are_read_again_must_be_the_same() -> None:
    content = bytearray(os.urandom(3 * PAGE - 100))
    passed = Digests({"a": len(content)}, {"a": hashlib.sha256(content).hexdigest()})
    added(passed, bytes(content), [0, PAGE, 2 * PAGE])
    passed.compare("a", PAGE // 2, memoryview(content)[PAGE // 2 :])
    content[-1] ^= 1
    passed.compare("a", 0, memoryview(content)[: 2 * PAGE])
    passed.compare("a", 2 * PAGE, memoryview(content)[2 * PAGE : -200])  # the last chunk is not whole
    with pytest.raises(SourceError):
        passed.compare("a", 2 * PAGE, memoryview(content)[2 * PAGE :])


# --- the window ------------------------------------------------------------------------------------------------------


def test_a_released_slot_is_poisoned_and_has_no_owner() -> None:
    window = Window(PAGE, 1, poison=True)
    slot = window.acquire(10)
    assert slot is not None
    view = window.view(slot)
    view[:] = b"0123456789"
    window.release(slot)
    assert bytes(view) == b"\xff" * 10
    for use in (window.view, window.release):
        with pytest.raises(AssertionError):
            use(slot)


def test_the_other_process_cannot_write_into_the_window() -> None:
    window = Window(PAGE, 1)
    assert window.is_sealed
    for write in (
        lambda: os.pwrite(window.descriptor, b"x", 0),
        lambda: mmap.mmap(window.descriptor, PAGE),
        lambda: os.ftruncate(window.descriptor, 0),
    ):
        with pytest.raises(PermissionError):
            write()
    assert os.pread(window.descriptor, 1, 0) == b"\0"


def test_a_window_says_that_the_kernel_cannot_seal_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a kernel before 5.1. This one refuses seals of a file that was made without MFD_ALLOW_SEALING."""
    own = os.memfd_create
    monkeypatch.setattr(os, "memfd_create", lambda name, flags: own(name, flags & ~os.MFD_ALLOW_SEALING))
    window = Window(PAGE, 1)
    assert not window.is_sealed
    os.pwrite(window.descriptor, b"x", 0)
    slot = window.acquire(1)
    assert slot is not None
    assert bytes(window.view(slot)) == b"x"


@pytest.mark.parametrize("size_bytes", [0, PAGE + 1])
def test_a_slot_has_whole_pages(size_bytes: int) -> None:
    with pytest.raises(ValueError, match=str(PAGE)):
        Window(size_bytes, 1)


@pytest.mark.parametrize("size_bytes", [0, PAGE + 1])
def test_what_does_not_fit_is_refused(size_bytes: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Window(PAGE, 1).acquire(size_bytes)


def test_a_size_that_no_model_has_is_refused() -> None:
    refuse_excess({"a": MOST_BASE_BYTES // 2, "b": MOST_BASE_BYTES // 2})
    with pytest.raises(SourceError, match="together"):
        refuse_excess({"a": 1 << 62, "b": 1})
