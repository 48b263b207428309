"""A feed for several skeletons of one base: bytes that all of them need are read once, and shared.

In: the base's `Feed`. Out: the same bytes, from memory while they are `shared`. Knows no model.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from merge_gate.sources.feed import Feed, FileSpan


class SharedReads(Feed):
    """A `Feed` over another one. Its methods may be called by several threads."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._shared: list[_SharedSpan] = []
        self._lock = threading.Lock()

    def open_files(self, files: Sequence[str]) -> None:
        self._feed.open_files(files)

    def expect(self, spans: Sequence[FileSpan], *, whole: bool, is_due: bool = True) -> None:
        self._feed.expect(spans, whole=whole, is_due=is_due)

    def read(self, file: str, start: int, into: memoryview) -> None:
        into = into.cast("B")
        with self._lock:
            found = next((one for one in self._shared if one.has(file, start, start + len(into))), None)
        if found is None:
            self._feed.read(file, start, into)
        elif len(into):
            found.copy(start, into)

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
        begin, parts = 0, list[_SharedSpan]()
        for span in spans:
            end = begin + span.end - span.start
            self._feed.read(span.file, span.start, memoryview(memory)[begin:end])
            parts.append(_SharedSpan(span=span, content=content[begin:end]))
            begin = end
        with self._lock:
            self._shared += parts
        try:
            yield
        finally:
            with self._lock:
                self._shared = [one for one in self._shared if not any(one is mine for mine in parts)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _SharedSpan:
    span: FileSpan
    content: torch.Tensor

    def has(self, file: str, start: int, end: int) -> bool:
        return file == self.span.file and self.span.start <= start and end <= self.span.end

    def copy(self, start: int, into: memoryview) -> None:
        """The copy runs without Python's lock, so that other threads go on meanwhile."""
        start -= self.span.start
        torch.frombuffer(into, dtype=torch.uint8).copy_(self.content[start : start + len(into)])
