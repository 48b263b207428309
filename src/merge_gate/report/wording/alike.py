"""Entries of a report of which the same is so, so that it is said once.

In: entries. Out: the same, by what is to be said of them: of one adapter in several dtypes, and of several adapters.
Knows no format's syntax.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from merge_gate.records.terms import Severity, Verdict
from merge_gate.report.wording import words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from merge_gate.records.report import AdapterReport, Report
    from merge_gate.records.terms import Finding

Told: TypeAlias = "list[list[AdapterReport]]"
"""Adapters of which the same is said, each in all the dtypes of which it is so."""


def paragraphs(report: Report) -> list[Told]:
    """The entries of each adapter that has something to say; of adapters that say the same, together."""
    found: dict[object, Told] = {}
    for same in by_adapter(words.worst_first(report.adapters)):
        said = told_once(same, words.others)
        adapter = same[0]
        has_more_than_notes = any(finding.severity is not Severity.NOTE for finding, _, _ in said)
        if adapter.verdict is not Verdict.PASSED or has_more_than_notes:
            decided = (adapter.verdict, adapter.cause, words.deciding(adapter))
            key = (*decided, *said, words.precisions(same), *words.marks(_at(adapter, "")))
            found.setdefault(key, []).append(same)
    return list(found.values())


def by_adapter(adapters: Iterable[AdapterReport]) -> list[list[AdapterReport]]:
    """Entries of one adapter that the same finding decides in several dtypes, as what its files show."""
    groups: dict[object, list[AdapterReport]] = {}
    for adapter in adapters:
        key = (
            adapter.name,
            adapter.source,
            adapter.base.model,
            adapter.verdict,
            adapter.cause,
            words.deciding(adapter),
        )
        groups.setdefault(key, []).append(adapter)
    return list(groups.values())


def told_once(
    same: list[AdapterReport], findings: Callable[[AdapterReport], list[Finding]]
) -> list[tuple[Finding, int, str]]:
    """The first of each kind of finding in any of them, how many more, and in which of their dtypes; empty for all."""
    entries: dict[tuple[Finding, ...], list[AdapterReport]] = {}
    for adapter in same:
        for kind in words.kinds(findings(adapter)):
            entries.setdefault(kind, []).append(adapter)
    return [
        (kind[0], len(kind) - 1, "" if len(those) == len(same) else words.precisions(those))
        for kind, those in entries.items()
    ]


def told_before(adapters: Iterable[AdapterReport]) -> dict[int, dict[Finding, AdapterReport]]:
    """Which earlier entry of the same adapter, in another dtype, has all that this one has of a kind of finding.

    By the entry's place in `adapters`, if there is any, and the first finding of that kind.
    """
    first: dict[object, AdapterReport] = {}
    found: dict[int, dict[Finding, AdapterReport]] = {}
    for place, adapter in enumerate(adapters):
        for kind in words.kinds(adapter.findings):
            key = (adapter.name, adapter.source, adapter.base.model, kind)
            earlier = first.setdefault(key, adapter)
            if earlier is not adapter:
                found.setdefault(place, {})[kind[0]] = earlier
    return found


def marks_of(adapters: Sequence[AdapterReport]) -> list[str]:
    """What marks all of these; of verdicts that were reached at several times, the oldest."""
    times = sorted({adapter.judged.at for adapter in adapters if adapter.judged})
    return words.marks(
        _at(adapters[0], f"{times[0]} (the oldest)" if times[1:] else times[0]) if times else adapters[0]
    )


def _at(adapter: AdapterReport, time: str) -> AdapterReport:
    return replace(adapter, judged=replace(adapter.judged, at=time)) if adapter.judged else adapter
