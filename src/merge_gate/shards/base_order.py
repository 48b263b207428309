"""The order in which a report lists its bases, which is the same for one machine and for several.

In: each base with the position of an entry that was merged into it. Out: each base once, in order.
"""

from __future__ import annotations

from collections.abc import Iterable

from merge_gate.records.report import BaseReport
from merge_gate.records.terms import BaseKey


def in_order(uses: Iterable[tuple[BaseReport, int]]) -> dict[BaseReport, int]:
    """The bases, each with the position of the first entry that was merged into it.

    A base comes before another if its first use does. The classes that one base was loaded as stay together.
    """
    first: dict[BaseReport, int] = {}
    for base, position in uses:
        first[base] = min(position, first.get(base, position))
    first_of_key: dict[BaseKey, int] = {}
    for base, position in first.items():
        first_of_key[base.key] = min(position, first_of_key.get(base.key, position))
    return dict(sorted(first.items(), key=lambda use: (first_of_key[use[0].key], use[1])))
