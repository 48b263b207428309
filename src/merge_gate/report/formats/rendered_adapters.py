"""Keeps the text of each adapter of the last report, so that the next report of the run can reuse it.

Adapters and everything else that their texts depend on go in. Texts come out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from merge_gate.records.report import AdapterReport


class RenderedAdapters:
    """The texts of the adapters of the last report, in one format."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[AdapterReport, tuple[Any, ...], str]] = {}

    def texts(self, make: Callable[..., str], adapters: Sequence[AdapterReport], *given: Iterable[Any]) -> list[str]:
        """Return `make(adapter, *given)` for each adapter. A text of the last report is reused.

        Args:
            make: its text must depend only on its arguments.
            adapters: the adapters of one report, distinguished by identity.
            given: the other arguments, in the order of the adapters.
        """
        entries = [self._entry(make, adapter, rest) for adapter, *rest in zip(adapters, *given, strict=True)]
        self._last = {id(entry[0]): entry for entry in entries}
        return [text for _, _, text in entries]

    def _entry(
        self, make: Callable[..., str], adapter: AdapterReport, given: list[Any]
    ) -> tuple[AdapterReport, tuple[Any, ...], str]:
        last = self._last.get(id(adapter))
        if last is not None and last[0] is adapter and last[1] == tuple(given):
            return last
        return adapter, tuple(given), make(adapter, *given)
