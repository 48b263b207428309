"""The order in which a report lists its bases, which must not depend on how many machines had a part of the run.

In: bases, each with the place of the first entry that was merged into it. Out: the same, in order, each once.
"""

from __future__ import annotations

from collections.abc import Iterable

from merge_gate.records.report import BaseReport
from merge_gate.records.terms import BaseKey, record


@record
class Used:
    """A base, and the position of the first entry that was merged into it."""

    base: BaseReport
    position: int


def in_order(used: Iterable[Used]) -> tuple[Used, ...]:
    """By the first entry of the base in any class that it was loaded as, then by the first of that class."""
    first: dict[BaseReport, int] = {}
    for one in used:
        first[one.base] = min(one.position, first.get(one.base, one.position))
    begins: dict[BaseKey, int] = {}
    for base, position in first.items():
        begins[base.key] = min(position, begins.get(base.key, position))
    ordered = sorted(first, key=lambda base: (begins[base.key], first[base]))
    return tuple(Used(base=base, position=first[base]) for base in ordered)
