"""The feed of every run in the tests: a released slot is poisoned, and no slot changes while the worker has it."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

from merge_gate.worker.feed_service import FeedService

if TYPE_CHECKING:
    from merge_gate.sources.feed import FileSpan
    from merge_gate.sources.window import WindowSlot


class CheckedFeedService(FeedService):
    """Compares the checksum of each slot when it is lent and when it is released. `changed` has those that differ."""

    changed: list[WindowSlot] = []  # noqa: RUF012 - of the whole process of tests

    def __init__(self, *given: Any) -> None:
        super().__init__(*given, poison=True)
        self._checksums: dict[tuple[bool, int], int] = {}

    def lend(self, number: int, span: FileSpan, slot: WindowSlot) -> None:
        self._checksums[number < 0, slot.start] = self._checksum(number, slot)
        super().lend(number, span, slot)

    def _release(self, number: int, start: int) -> None:
        slot = self._lent.get((number < 0, start))
        if slot is not None and self._checksums.pop((number < 0, start)) != self._checksum(number, slot):
            self.changed.append(slot)
        super()._release(number, start)

    def _checksum(self, number: int, slot: WindowSlot) -> int:
        assert self._windows is not None
        return zlib.crc32(self._windows[number < 0].view(slot))
