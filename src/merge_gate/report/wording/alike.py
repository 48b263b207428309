"""Groups entries of a report with identical findings, so that each finding is shown once.

Entries of one adapter in several dtypes are grouped, and several adapters with the same findings.
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

AlikeAdapters: TypeAlias = "list[list[AdapterReport]]"
"""Adapters with the same findings; each adapter is a list of its entries, one per dtype."""


def paragraphs(report: Report) -> list[AlikeAdapters]:
    """The adapters that failed, were not judged, or have warnings, grouped by equal findings."""
    groups: dict[object, AlikeAdapters] = {}
    for same in by_adapter(words.worst_first(report.adapters)):
        others = unique_findings(same, words.others)
        adapter = same[0]
        has_more_than_notes = any(finding.severity is not Severity.NOTE for finding, _, _ in others)
        if adapter.verdict is not Verdict.PASSED or has_more_than_notes or words.answers(adapter):
            decided = (adapter.verdict, adapter.cause, words.deciding(adapter))
            key = (*decided, *others, words.precisions(same), *words.marks(_at(adapter, "")))
            groups.setdefault(key, []).append(same)
    return list(groups.values())


def by_adapter(adapters: Iterable[AdapterReport]) -> list[list[AdapterReport]]:
    """Group the entries of one adapter in several dtypes if the same finding decides them."""
    groups = words.by(
        adapters, lambda one: (one.name, one.source, one.base.model, one.verdict, one.cause, words.deciding(one))
    )
    return list(groups.values())


def unique_findings(
    same: list[AdapterReport], findings: Callable[[AdapterReport], list[Finding]]
) -> list[tuple[Finding, tuple[Finding, ...], str]]:
    """The first finding of each kind in any entry, the other findings, and the dtypes (empty for all dtypes)."""
    entries: dict[tuple[Finding, ...], list[AdapterReport]] = {}
    for adapter in same:
        for kind in words.kinds(findings(adapter)):
            entries.setdefault(kind, []).append(adapter)
    return [
        (kind[0], kind[1:], "" if len(having) == len(same) else words.precisions(having))
        for kind, having in entries.items()
    ]


def earlier_entries(adapters: Iterable[AdapterReport]) -> dict[int, dict[Finding, AdapterReport]]:
    """Find the earlier entry of the same adapter, in another dtype, that has all findings of a kind.

    The result maps an entry's index in `adapters`, and the first finding of the kind, to the earlier entry.
    """
    first: dict[object, AdapterReport] = {}
    earlier_by_index: dict[int, dict[Finding, AdapterReport]] = {}
    for index, adapter in enumerate(adapters):
        for kind in words.kinds(adapter.findings):
            key = (adapter.name, adapter.source, adapter.base.model, kind)
            earlier = first.setdefault(key, adapter)
            if earlier is not adapter:
                earlier_by_index.setdefault(index, {})[kind[0]] = earlier
    return earlier_by_index


def marks_of(adapters: Sequence[AdapterReport]) -> list[str]:
    """The marks that all these adapters share. If their verdicts have several times, the oldest is shown."""
    times = sorted({adapter.judged.at for adapter in adapters if adapter.judged})
    return words.marks(
        _at(adapters[0], f"{times[0]} (the oldest)" if times[1:] else times[0]) if times else adapters[0]
    )


def _at(adapter: AdapterReport, time: str) -> AdapterReport:
    return replace(adapter, judged=replace(adapter.judged, at=time)) if adapter.judged else adapter
