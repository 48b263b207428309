"""Findings, however many and however long → as many as a reader can use, and how many more there are.

In: findings, one after the other. Out: the first of each check and severity, their texts cut, and a last one that
counts the rest. Holds no more than it gives out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from merge_gate.records.terms import Finding, Severity

MOST_FINDINGS = 100
"""Of one check and one severity."""

MOST_CHARACTERS = 2_000
"""Of one message, hint or name."""

_MORE = "more"


def bounded(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings, bounded in number and length, in their order; what is left out is counted."""
    kept: list[Finding] = []
    counts: Counter[tuple[str, Severity]] = Counter()
    left_out: dict[tuple[str, Severity], Finding] = {}
    for finding in findings:
        key = (finding.check, finding.severity)
        counts[key] += _stands_for(finding)
        if counts[key] <= MOST_FINDINGS:
            kept.append(_cut(finding))
        else:
            left_out.setdefault(key, finding)
    return (*kept, *(_rest(one, counts[key] - MOST_FINDINGS) for key, one in left_out.items()))


def _stands_for(finding: Finding) -> int:
    """Bounded findings may be bounded again."""
    return int(dict(finding.measured).get(_MORE, 1))


def _rest(example: Finding, count: int) -> Finding:
    return Finding(
        check=example.check,
        severity=example.severity,
        message=f"and {count:,} more like these",
        origin=example.origin,
        measured=((_MORE, float(count)),),
    )


def _cut(finding: Finding) -> Finding:
    return replace(
        finding,
        message=cut(finding.message),
        hint=cut(finding.hint),
        module=cut(finding.module) if finding.module else finding.module,
        tensor=cut(finding.tensor) if finding.tensor else finding.tensor,
    )


def cut(text: str) -> str:
    """At most `MOST_CHARACTERS` of a text; what is left out is counted."""
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}… ({len(text) - MOST_CHARACTERS:,} more)"
