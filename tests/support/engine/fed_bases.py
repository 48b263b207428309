"""What a skeleton is made of (engine/base/skeleton.py): the source of a base, and a feed that counts its reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merge_gate._internal.errors import SourceError
from merge_gate.engine.base.loaded_base import Source
from merge_gate.files.feed import LocalFeed
from merge_gate.records.files import FileSpan


class EndingFeed(LocalFeed):
    """Whose bytes cannot be had after six reads."""

    reads = 0

    def read(self, file: str, start: int, into: memoryview) -> None:
        self.reads += 1
        if self.reads > 6:
            raise SourceError("gone")
        super().read(file, start, into)


class CountingFeed(LocalFeed):
    """A feed that knows what it was asked for."""

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        self.reads: list[FileSpan] = []
        self.expected: list[list[FileSpan]] = []
        self.prefetched: list[list[FileSpan]] = []

    def expect(self, spans: Sequence[FileSpan], *, whole: bool, needed_now: bool = True) -> None:
        (self.expected if needed_now else self.prefetched).append(list(spans))

    def read(self, file: str, start: int, into: memoryview) -> None:
        self.reads.append(FileSpan(file=file, start=start, end=start + into.nbytes))
        super().read(file, start, into)


def source(directory: Path, dtype: str = "auto", **changes: Any) -> Source:
    return Source(**{"directory": str(directory), "label": "base", "dtype": dtype, **changes})
