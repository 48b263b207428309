"""The feed of a base whose files the parent process reads, and its calls (features/stream/feed_service.py).

In: spans that will be read, and reads. Out: the bytes of a base.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from merge_gate.files.feed import PIECE_BYTES, Feed
from merge_gate.records.files import FileSpan
from merge_gate.records.terms import record

if TYPE_CHECKING:
    from merge_gate.worker.call_client import CallClient


@record
class SpansExpected:
    """The worker will need these bytes of a group's base, in this order. Replaces what it expected before.

    `whole`: the rest of the files is to be read and hashed, too. `needed_now`: they are read from now on; if not, they
    are only read ahead.
    """

    group: int
    spans: tuple[FileSpan, ...]
    whole: bool
    needed_now: bool = True


@record
class BytesRequested:
    """The worker needs these bytes of a group's base now. They come with the answer."""

    group: int
    span: FileSpan


class ParentFeed(Feed):
    """Reads a group's base. With `is_aside`, nothing of it is read ahead: that is for another base."""

    def __init__(self, client: CallClient, group: int, *, is_aside: bool = False) -> None:
        self._client, self._group, self._is_aside = client, group, is_aside

    def begin(self) -> ParentFeed:
        """Read this base from now on, and no other one ahead.

        Raises:
            SourceError: the parent cannot open its files.
        """
        self._expect((), whole=False)
        return self

    def expect(self, spans: Sequence[FileSpan], *, whole: bool, needed_now: bool = True) -> None:
        if not self._is_aside:
            self._expect(tuple(span for span in spans if span.start < span.end), whole=whole, needed_now=needed_now)

    def _expect(self, spans: tuple[FileSpan, ...], *, whole: bool, needed_now: bool = True) -> None:
        self._client.call(SpansExpected(group=self._group, spans=spans, whole=whole, needed_now=needed_now))

    def read(self, file: str, start: int, into: memoryview) -> None:
        into = into.cast("B")
        self._client.fetch(
            (BytesRequested(group=self._group, span=span), into[span.start - start : span.end - start])
            for span in _on_grid(file, start, start + len(into))
        )


def _on_grid(file: str, start: int, end: int) -> Iterator[FileSpan]:
    """A range in pieces that are cut where all pieces of the file are cut."""
    while start < end:
        until = min(end, start - start % PIECE_BYTES + PIECE_BYTES)
        yield FileSpan(file=file, start=start, end=until)
        start = until
