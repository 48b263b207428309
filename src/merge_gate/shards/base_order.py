"""The order in which a report lists its bases, which is the same for one machine and for several.

In: each base with the position and the name of an entry that was merged into it. Out: each base once, in order.
"""

from __future__ import annotations

from collections.abc import Iterable

from merge_gate.records.report import BaseReport
from merge_gate.records.terms import BaseKey

_Use = tuple[int, str]


def in_order(uses: Iterable[tuple[BaseReport, _Use]]) -> dict[BaseReport, _Use]:
    """The bases, each with the position and the name of the first entry that was merged into it.

    A base comes before another if its first use does. The classes that one base was loaded as stay together.
    """
    first: dict[BaseReport, _Use] = {}
    for base, use in uses:
        first[base] = min(use, first.get(base, use))
    first_of_key: dict[BaseKey, _Use] = {}
    for base, use in first.items():
        first_of_key[base.key] = min(use, first_of_key.get(base.key, use))
    return dict(sorted(first.items(), key=lambda item: (first_of_key[item[0].key], item[1])))
