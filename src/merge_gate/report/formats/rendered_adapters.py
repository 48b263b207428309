"""Keeps the text of each adapter of the last report.json, so that the next report of the run can reuse it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from merge_gate.records.report import AdapterReport


class RenderedAdapters:
    """The texts of the adapters of the last report."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[AdapterReport, str]] = {}

    def texts(self, make: Callable[[AdapterReport], str], adapters: Iterable[AdapterReport]) -> list[str]:
        """Return `make(adapter)` for each adapter. If the last report had the same object, its text is reused."""
        entries = [self._last.get(id(adapter)) or (adapter, make(adapter)) for adapter in adapters]
        self._last = {id(adapter): (adapter, text) for adapter, text in entries}
        return [text for _, text in entries]
