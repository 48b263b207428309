"""The texts of adapters that the last report had, for the next one of that run, which holds mostly the same.

In: adapters, and what else their texts depend on. Out: texts. Knows no format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from merge_gate.records.report import AdapterReport


class Remembered:
    """The texts of one format, those of the last report."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[AdapterReport, tuple[Any, ...], str]] = {}

    def texts(self, make: Callable[..., str], adapters: Sequence[AdapterReport], *given: Iterable[Any]) -> list[str]:
        """`make(adapter, *given)` for each of `adapters`; what the last report had of it is not made again.

        Args:
            make: its text must follow from what it is given.
            adapters: of one report; told apart by identity.
            given: for each adapter, in their order.
        """
        known = [self._known(make, adapter, rest) for adapter, *rest in zip(adapters, *given, strict=True)]
        self._last = {id(one[0]): one for one in known}
        return [text for _, _, text in known]

    def _known(
        self, make: Callable[..., str], adapter: AdapterReport, given: list[Any]
    ) -> tuple[AdapterReport, tuple[Any, ...], str]:
        known = self._last.get(id(adapter))
        if known is not None and known[0] is adapter and known[1] == tuple(given):
            return known
        return adapter, tuple(given), make(adapter, *given)
