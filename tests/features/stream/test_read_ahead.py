"""Bytes come in order and whole, through few slots, and those that are read again are the same as before."""

import hashlib
import mmap
import os
import random
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from merge_gate._internal.errors import SourceError
from merge_gate.features.stream.read_ahead import MOST_BASE_BYTES, FedBase, ReadAhead, Window, plan, refuse_excess
from merge_gate.records.files import FileIdentity, FileSpan

pytestmark = pytest.mark.usefixtures("small_pieces")

PAGE = mmap.PAGESIZE


class Files:
    """Files in memory, read more or less slowly."""

    def __init__(self, *sizes: int) -> None:
        numbers = random.Random(1)
        self.content = {f"{number}.safetensors": numbers.randbytes(size) for number, size in enumerate(sizes)}
        self.sizes = {name: len(content) for name, content in self.content.items()}
        self.sha256: Mapping[str, str] = {}
        self.identity: tuple[FileIdentity, ...] = ()
        self.delays = random.Random(2)
        self.on_read: Callable[[str, int], None] = lambda _name, _start: None

    def read(self, file: str, start: int, into: memoryview) -> None:
        time.sleep(self.delays.random() / 500)
        self.on_read(file, start)
        into[:] = self.content[file][start : start + len(into)]


def begun(files: Files, slots: int, spans: Sequence[FileSpan] | None = None, **options: Any) -> ReadAhead:
    """A pass over all bytes, or these."""
    everything = [span(name, 0, size) for name, size in files.sizes.items()]
    ahead = ReadAhead(FedBase(files), everything if spans is None else spans, Window(slots), whole=True, **options)
    ahead.start()
    return ahead


def read(ahead: ReadAhead, file: str, start: int, end: int) -> bytes:
    content, done = bytearray(end - start), 0
    while done < len(content):
        done += ahead.read(file, start + done, memoryview(content)[done:])
    return bytes(content)


def threads_end(before: int) -> bool:
    until = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    return threading.active_count() <= before


@pytest.mark.parametrize("slots", [1, 4, 9])
def test_all_bytes_come_in_order(slots: int) -> None:
    before, files = threading.active_count(), Files(10 * PAGE + 7, 1, 5 * PAGE)
    ahead, reads = begun(files, slots), list[tuple[str, int]]()
    files.on_read = lambda file, start: reads.append((file, start))
    for name, content in files.content.items():
        for start in range(0, len(content), 1000):
            assert read(ahead, name, start, min(start + 1000, len(content))) == content[start : start + 1000]
    assert ahead.base.known == {name: hashlib.sha256(content).hexdigest() for name, content in files.content.items()}
    assert len(reads) == len(set(reads)), "each byte was read once"
    assert threads_end(before)


def test_no_more_is_read_than_the_window_holds() -> None:
    files, before = Files(64 * PAGE), threading.active_count()
    starts: list[int] = []
    files.on_read = lambda _, start: starts.append(start)
    ahead = begun(files, 9)
    time.sleep(0.3)
    assert len(starts) == 9
    read(ahead, "0.safetensors", 0, PAGE - 1)
    time.sleep(0.1)
    assert len(starts) == 9
    read(ahead, "0.safetensors", PAGE - 1, PAGE)
    time.sleep(0.3)
    assert len(starts) == 10
    ahead.cancel()
    assert threads_end(before)


@pytest.mark.parametrize("is_read", [True, False])
def test_canceling_ends_the_threads_and_frees_the_slots(*, is_read: bool) -> None:
    files, before, window = Files(64 * PAGE), threading.active_count(), Window(5)
    ahead = ReadAhead(FedBase(files), [span("0.safetensors", 0, 64 * PAGE)], window, whole=True)
    ahead.start()
    if is_read:
        read(ahead, "0.safetensors", 0, PAGE + 1)
    else:
        time.sleep(0.1)  # no one frees a slot
    ahead.cancel()
    assert threads_end(before)
    assert len(window.free) == 5
    assert read(ahead, "0.safetensors", 3 * PAGE, 5 * PAGE) == files.content["0.safetensors"][3 * PAGE : 5 * PAGE]


def test_a_pass_that_ends_with_an_error_ends_so_for_its_readers() -> None:
    files, may_end = Files(8 * PAGE), threading.Event()
    files.on_read = lambda *_: may_end.wait(20) and None
    ahead = begun(files, 3)
    threading.Timer(0.2, ahead.cancel, (SourceError("the run ends"),)).start()
    with pytest.raises(SourceError, match="the run ends"):
        read(ahead, "0.safetensors", 0, PAGE)
    may_end.set()


def test_a_pass_that_fails_gives_all_slots_back() -> None:
    """Also those of pieces that arrive after it failed: the window is that of the next pass, too."""
    files, window = Files(12 * PAGE), Window(8)

    def first_is_broken(_: str, start: int) -> None:
        time.sleep(0.3 if start else 0.1)
        if not start:
            raise OSError("the line is dead")

    files.on_read = first_is_broken
    ahead = ReadAhead(FedBase(files), [span("0.safetensors", 0, 12 * PAGE)], window, whole=True)
    ahead.start()
    with window.changed:
        assert window.changed.wait_for(lambda: len(window.free) < 4, timeout=20)
        assert window.changed.wait_for(lambda: len(window.free) == 8, timeout=20)


def test_what_overlaps_or_was_not_expected_is_read_all_the_same() -> None:
    files = Files(10 * PAGE)
    content = files.content["0.safetensors"]
    ahead = begun(files, 2, [span("0.safetensors", PAGE, 5 * PAGE + 3), span("0.safetensors", 2 * PAGE, 3 * PAGE)])
    for start, end in ((0, 10), (PAGE, 2 * PAGE), (PAGE, 3 * PAGE + 1), (9 * PAGE, 10 * PAGE), (3 * PAGE, 6 * PAGE)):
        assert read(ahead, "0.safetensors", start, end) == content[start:end]
    assert ahead.base.are_complete, "it returned after all had passed"


# --- what is read ----------------------------------------------------------------------------------------------------


def span(file: str, start: int, end: int) -> FileSpan:
    return FileSpan(file=file, start=start, end=end)


def test_a_file_without_a_digest_is_read_whole() -> None:
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


def fed(sizes: Mapping[str, int], sha256: Mapping[str, str]) -> FedBase:
    files = Files()
    files.sizes, files.sha256 = sizes, sha256  # type: ignore[assignment]
    return FedBase(files)


def added(passed: FedBase, content: bytes, starts: list[int]) -> None:
    for start in starts:
        passed.add("a", start, memoryview(content)[start : start + PAGE])


def test_a_file_has_a_digest_once_its_bytes_passed_in_order() -> None:
    content = os.urandom(3 * PAGE + 1)
    passed = fed({"a": len(content)}, {})
    added(passed, content, [0, 2 * PAGE, 3 * PAGE])
    assert not passed.are_complete
    added(passed, content, [PAGE, 2 * PAGE])
    passed.begin()
    added(passed, content, [3 * PAGE])
    assert passed.known == {}
    added(passed, content, [0, PAGE, 2 * PAGE, 3 * PAGE])
    assert passed.known == {"a": hashlib.sha256(content).hexdigest()}
    assert passed.are_complete


def test_bytes_that_are_read_again_must_be_the_same() -> None:
    content = bytearray(os.urandom(3 * PAGE - 100))
    passed = fed({"a": len(content)}, {"a": hashlib.sha256(content).hexdigest()})
    added(passed, bytes(content), [0, PAGE, 2 * PAGE])
    passed.compare("a", PAGE // 2, memoryview(content)[PAGE // 2 :])
    content[-1] ^= 1
    passed.compare("a", 0, memoryview(content)[: 2 * PAGE])
    passed.compare("a", 2 * PAGE, memoryview(content)[2 * PAGE : -200])  # the last chunk is not whole
    with pytest.raises(SourceError):
        passed.compare("a", 2 * PAGE, memoryview(content)[2 * PAGE :])


def test_a_size_that_no_model_has_is_refused() -> None:
    refuse_excess({"a": MOST_BASE_BYTES // 2, "b": MOST_BASE_BYTES // 2})
    with pytest.raises(SourceError, match="together"):
        refuse_excess({"a": 1 << 62, "b": 1})


# --- bytes that are read again ---------------------------------------------------------------------------------------

NAME, CHUNK = "model.safetensors", PAGE // 2
CONTENT = bytes(range(256)) * (CHUNK // 128)


class Remote:
    """One file, whose bytes may change."""

    def __init__(self, sha256: Mapping[str, str]) -> None:
        self.content = bytearray(CONTENT)
        self.sizes, self.sha256 = {NAME: len(CONTENT)}, sha256
        self.identity: tuple[FileIdentity, ...] = ()

    def read(self, file: str, start: int, into: memoryview) -> None:
        into[:] = self.content[start : start + len(into)]


def forged(content: bytes, crc: int) -> bytes:
    """The content with other bytes in the middle, and four bytes after them that give it this CRC-32."""
    head, tail = bytearray(content[: len(content) // 2]), content[len(content) // 2 + 4 :]
    head[:4] = b"evil"
    columns = [zlib.crc32(bytes(head) + (1 << bit).to_bytes(4, "little") + tail) for bit in range(32)]
    zero = zlib.crc32(bytes(head) + bytes(4) + tail)
    rows = [(column ^ zero, 1 << bit) for bit, column in enumerate(columns)]
    wanted, patch = crc ^ zero, 0
    basis: dict[int, tuple[int, int]] = {}
    for row in rows:  # Gauss over the 32 bits: the CRC is linear
        value, bits = row
        while value and (top := value.bit_length()) in basis:
            value, bits = value ^ basis[top][0], bits ^ basis[top][1]
        if value:
            basis[value.bit_length()] = value, bits
    while wanted:
        wanted, patch = wanted ^ basis[wanted.bit_length()][0], patch ^ basis[wanted.bit_length()][1]
    return bytes(head) + patch.to_bytes(4, "little") + tail


@pytest.mark.attempt("S13", "a second read gets other bytes with the same CRC-32", "changed while it was read")
@pytest.mark.attempt("S09", "the same, for bytes that are read again for a publication", "changed while it was read")
def test_a_forged_checksum_does_not_help() -> None:
    remote = Remote({NAME: hashlib.sha256(CONTENT).hexdigest()})
    base = FedBase(remote)
    base.add(NAME, 0, memoryview(CONTENT))
    chunk = CONTENT[:CHUNK]
    remote.content[:CHUNK] = forged(chunk, zlib.crc32(chunk))
    assert remote.content != CONTENT
    assert zlib.crc32(remote.content[:CHUNK]) == zlib.crc32(chunk)
    with pytest.raises(SourceError):
        base.read(NAME, 0, memoryview(bytearray(10)))


def test_local_bytes_are_watched_by_their_files() -> None:
    into = bytearray(10)
    FedBase(Remote({})).read(NAME, 5, memoryview(into))
    assert into == CONTENT[5:15]
