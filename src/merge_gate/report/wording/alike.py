"""Groups entries of a report with identical findings, so that each finding is shown once.

Entries of one adapter in several dtypes are grouped, and several adapters with the same findings. The findings of a
kind that a format does not show one by one become a sentence.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from merge_gate._internal.text import listing
from merge_gate.records.terms import Severity, Verdict
from merge_gate.report.wording import words
from merge_gate.report.wording.grid import LAYER
from merge_gate.report.wording.untrusted import one_line, shorten_between_words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from merge_gate.records.report import AdapterReport, Report
    from merge_gate.records.terms import Finding

AlikeAdapters: TypeAlias = "list[list[AdapterReport]]"
"""Adapters with the same findings; each adapter is a list of its entries, one per dtype."""

_MOST_NAMES = 3
_MESSAGE_LENGTH = 120


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
        adapters,
        lambda item: (
            (item.name, item.source, item.base.model, item.verdict, item.cause, item.accepted, words.deciding(item))
        ),
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


def earlier_entries(adapters: Iterable[AdapterReport]) -> list[dict[Finding, AdapterReport]]:
    """For each entry, the earlier entries of the same adapter, in another dtype, that have all findings of a kind.

    The key is the first finding of the kind.
    """
    first: dict[object, AdapterReport] = {}
    earlier: list[dict[Finding, AdapterReport]] = []
    for adapter in adapters:
        keys = [(adapter.name, adapter.source, adapter.base.model, kind) for kind in words.kinds(adapter.findings)]
        earlier.append({key[-1][0]: first[key] for key in keys if key in first})
        for key in keys:
            first.setdefault(key, adapter)
    return earlier


def marks_of(adapters: Sequence[AdapterReport]) -> list[str]:
    """The marks that all these adapters share. If their verdicts have several times, the oldest is shown."""
    times = sorted({adapter.judged.at for adapter in adapters if adapter.judged})
    return words.marks(
        _at(adapters[0], f"{times[0]} (the oldest)" if times[1:] else times[0]) if times else adapters[0]
    )


def _at(adapter: AdapterReport, time: str) -> AdapterReport:
    return replace(adapter, judged=replace(adapter.judged, at=time)) if adapter.judged else adapter


# --- the rest of a kind --------------------------------------------------------------------------------------------


def more_findings(rest: Sequence[Finding]) -> str:
    """The number of the findings, what they have in common, and where they are; empty if there are none."""
    if not rest:
        return ""
    counted = [finding for finding in rest if not _more(finding)]
    total = len(counted) + sum(map(_more, rest))
    parts = [_part(values, findings) for values, findings in words.by(counted, _values).items()]
    described = listing(filter(None, parts), _MOST_NAMES)
    return f"{total:,} more: {described}" if described else f"{total:,} more"


def _more(finding: Finding) -> int:
    """How many findings the last finding counts (judging/bounds.py); 0 for any other."""
    more = dict(finding.measured).get("more", 0.0)
    return int(more) if finding.message.startswith("and ") and 0 < more < 1 << 53 else 0


def _values(finding: Finding) -> str:
    kinds = ((finding.nan, "NaN"), (finding.posinf, "+Inf"), (finding.neginf, "-Inf"))
    return " and ".join(kind for count, kind in kinds if count)


def _part(values: str, findings: Sequence[Finding]) -> str:
    places = _places(findings)
    if values:
        return f"{values} in {len(findings):,}" + (f" ({places})" if places else "")
    if places:
        return f"in {places}"
    messages = dict.fromkeys(shorten_between_words(one_line(finding.message), _MESSAGE_LENGTH) for finding in findings)
    return listing(messages, _MOST_NAMES)


def _places(findings: Iterable[Finding]) -> str:
    """`layers 10–19, mlp.down_proj`; names without a layer as they are."""
    layers: set[int] = set()
    names: dict[str, None] = {}
    for finding in findings:
        name = finding.module or finding.tensor or ""
        match = LAYER.search(name)
        if match is not None:
            layers.add(int(match[0]))
            name = name[match.end() :].removeprefix(".")
        if name:
            names[one_line(name, words.NAME_LENGTH)] = None
    word = "layer" if len(layers) == 1 else "layers"
    parts = [f"{word} {_ranges(sorted(layers))}"] if layers else []
    return ", ".join([*parts, *([listing(names, _MOST_NAMES)] if names else [])])


def _ranges(numbers: Sequence[int]) -> str:
    """[1, 2, 3, 7] → 1–3, 7."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    shown = [str(span[0]) if len(span) == 1 else f"{span[0]}–{span[-1]}" for span in spans]  # noqa: RUF001 - as above
    return listing(shown, _MOST_NAMES * 2)
