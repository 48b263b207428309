"""Where the bytes of each stored tensor are in a base's files, and a feed that reads what several skeletons need once.

In: a directory, and the headers of its weight files as they were read before. Out: `StoredBytes` by name. Reads the
headers again to get the places, and compares them with the given headers. Knows no model.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from merge_gate.engine.base.tensor_map import DTYPES
from merge_gate.files.feed import Feed
from merge_gate.files.headers import CorruptFileError, open_regular, parse_places
from merge_gate.records.files import FileSpan, StoredTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBytes:
    """A stored tensor and its place. `order` sorts stored tensors as they are in the files."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    span: FileSpan
    order: tuple[int, int]

    def read(self, feed: Feed) -> torch.Tensor:
        """Its values, in new memory."""
        values = torch.empty(self.shape, dtype=self.dtype)
        feed.read(self.span.file, self.span.start, bytes_of(values))
        return values


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor. The tensor has to live as long as this is used."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


class MappedFiles:
    """Stored tensors that are mapped from their files for one load. What it writes goes to copies of the pages."""

    def __init__(self, directory: str, places: Mapping[str, StoredBytes]) -> None:
        self._files: dict[str, mmap.mmap] = {}
        for file in {place.span.file for place in places.values()}:
            with Path(directory, file).open("rb") as opened:
                self._files[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        self.tensors = {name: self._tensor(place) for name, place in places.items()}

    def _tensor(self, place: StoredBytes) -> torch.Tensor:
        count, file = torch.Size(place.shape).numel(), self._files[place.span.file]
        return torch.frombuffer(file, dtype=place.dtype, count=count, offset=place.span.start).view(place.shape)

    def unwritten(self) -> dict[str, torch.Tensor]:
        """The tensors, if no page was copied. A copied page shows that some code has written to it."""
        starts = {torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() for memory in self._files.values()}
        is_ours = False
        for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
            first, second, *_ = [*line.split(), ""]
            if not first.endswith(":"):
                is_ours = int(first.partition("-")[0], 16) in starts
            elif is_ours and first == "Anonymous:" and second != "0":
                return {}
        return self.tensors


def stored_bytes(directory: str, stored: Mapping[str, StoredTensor]) -> dict[str, StoredBytes]:
    """The place of each of these tensors.

    Raises:
        ValueError: a header is not what it was, or contradicts its file.
        OSError: a file cannot be read.
    """
    files = list(dict.fromkeys(tensor.file for tensor in stored.values()))
    places = {file: _places(directory, file) for file in files}
    by_name: dict[str, StoredBytes] = {}
    for name, tensor in stored.items():
        now, start, end = places[tensor.file].get(tensor.name, (None, 0, 0))
        if now != tensor:
            raise ValueError(f"{tensor.file}: the header has another {tensor.name} than before, or none")
        by_name[name] = StoredBytes(
            name=name,
            dtype=getattr(torch, DTYPES[tensor.dtype]),
            shape=tensor.shape,
            span=FileSpan(file=tensor.file, start=start, end=end),
            order=(files.index(tensor.file), start),
        )
    return by_name


def _places(directory: str, file: str) -> dict[str, tuple[StoredTensor, int, int]]:
    try:
        with open_regular(str(Path(directory, file))) as opened:
            return {
                tensor.name: (replace(tensor, file=file), start, end) for tensor, start, end in parse_places(opened)
            }
    except CorruptFileError as error:
        raise ValueError(f"{file} {error}") from error


class SharedReads(Feed):
    """A `Feed` over another one, for several skeletons of one base. Bytes that are `shared` are read once, and kept.

    Its methods may be called by several threads. `takers` get all bytes that are read, with their file and place.
    """

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self.takers: list[Callable[[str, int, memoryview], None]] = []
        self._shared: list[tuple[FileSpan, torch.Tensor]] = []
        self._lock = threading.Lock()

    def open_files(self, files: Sequence[str]) -> None:
        self._feed.open_files(files)

    def expect(self, spans: Sequence[FileSpan], *, whole: bool, needed_now: bool = True) -> None:
        self._feed.expect(spans, whole=whole, needed_now=needed_now)

    def read(self, file: str, start: int, into: memoryview) -> None:
        into = into.cast("B")
        end = start + len(into)
        with self._lock:
            spans = ((span, content) for span, content in self._shared if span.file == file)
            match = next(((span, content) for span, content in spans if span.start <= start and end <= span.end), None)
        if match is None:
            self._read(file, start, into)
        elif len(into):  # the copy runs without Python's lock, so that other threads go on meanwhile
            span, content = match
            torch.frombuffer(into, dtype=torch.uint8).copy_(content[start - span.start : end - span.start])

    def _read(self, file: str, start: int, into: memoryview) -> None:
        self._feed.read(file, start, into)
        for take in self.takers:
            take(file, start, into)

    @contextlib.contextmanager
    def shared(self, spans: Sequence[FileSpan]) -> Iterator[None]:
        """Read these spans once, in this order. Inside of the `with` block, every read of them is from memory.

        Raises:
            SourceError: they could not be had.
        """
        spans = [span for span in spans if span.start < span.end]
        # Memory of its own, because the worker's heap keeps what is freed (memory.py).
        memory = mmap.mmap(-1, max(1, sum(span.end - span.start for span in spans)))
        content = torch.frombuffer(memory, dtype=torch.uint8)
        begin, parts = 0, list[tuple[FileSpan, torch.Tensor]]()
        for span in spans:
            end = begin + span.end - span.start
            self._read(span.file, span.start, memoryview(memory)[begin:end])
            parts.append((span, content[begin:end]))
            begin = end
        with self._lock:
            self._shared += parts
        try:
            yield
        finally:
            with self._lock:
                self._shared = [part for part in self._shared if not any(part is mine for mine in parts)]
