"""Where the bytes of each stored tensor are in a base's files.

In: a directory, and the headers of its weight files as they were read before. Out: `StoredBytes` by name. Reads the
headers again to get the places, and compares them with the given headers. Knows no model.
"""

from __future__ import annotations

import ctypes
import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from merge_gate.engine.base.tensor_map import DTYPES
from merge_gate.records.files import StoredTensor
from merge_gate.sources.feed import Feed, FileSpan

MOST_HEADER_BYTES = 100_000_000
"""safetensors itself refuses longer headers."""


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
        """The tensors, if no page has a copy of its own: some code has written to such a page."""
        starts = {torch.frombuffer(one, dtype=torch.uint8, count=1).data_ptr() for one in self._files.values()}
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
    files = list(dict.fromkeys(one.file for one in stored.values()))
    headers = {file: _header(Path(directory, file)) for file in files}
    found: dict[str, StoredBytes] = {}
    for name, one in stored.items():
        dtype: torch.dtype = getattr(torch, DTYPES[one.dtype])
        start, end = _place(headers[one.file], one, torch.Size(one.shape).numel() * dtype.itemsize)
        found[name] = StoredBytes(
            name=name,
            dtype=dtype,
            shape=one.shape,
            span=FileSpan(file=one.file, start=start, end=end),
            order=(files.index(one.file), start),
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    entries: Mapping[str, Any]
    start: int
    end: int


def _header(path: Path) -> _Header:
    with path.open("rb") as file:
        size_bytes = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if length > min(MOST_HEADER_BYTES, size_bytes - 8):
            raise ValueError(f"{path.name}: the header has {length:,} bytes, and the file {size_bytes:,}")
        entries = json.loads(file.read(length))
    if not isinstance(entries, dict):
        raise ValueError(f"{path.name}: the header is not a JSON object")  # noqa: TRY004 - the file is at fault
    return _Header(entries=entries, start=8 + length, end=size_bytes)


def _place(header: _Header, one: StoredTensor, size_bytes: int) -> tuple[int, int]:
    """The offsets in the file, which have to fit the tensor that was read from the header before."""
    entry = header.entries.get(one.name)
    entry = entry if isinstance(entry, dict) else {}
    place = entry.get("data_offsets")
    if not isinstance(place, list) or [type(offset) for offset in place] != [int, int]:
        raise ValueError(f"{one.file}: the header has no place for {one.name}")
    start, end = header.start + place[0], header.start + place[1]
    is_same = entry.get("dtype") == one.dtype and entry.get("shape") == list(one.shape)
    if not is_same or end - start != size_bytes or not header.start <= start <= end <= header.end:
        raise ValueError(f"{one.file}: the header contradicts the place of {one.name}")
    return start, end
