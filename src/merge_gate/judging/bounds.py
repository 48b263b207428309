"""Limits the number of findings to what a reader can use, and counts the rest.

In: findings, one at a time. Out: the first of each check and severity with their texts cut, and a last one that counts
the rest. Keeps no others in memory. `files/preflight.py` bounds the findings on files, `all_checks.py` those of checks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from merge_gate._internal.text import repeatable
from merge_gate.records.refusals import MOST_OF_LOG
from merge_gate.records.terms import Finding, Severity

MOST_FINDINGS = 100
"""The findings of one check and one severity that are kept."""

MOST_CHARACTERS = 2_000
"""The characters of one message, hint, or name that are kept."""


def bounded(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings in their order, bounded in number and length. Counts the ones that it leaves out."""
    kept: list[Finding] = []
    counts: Counter[tuple[str, Severity]] = Counter()
    left_out: dict[tuple[str, Severity], Finding] = {}
    for finding in findings:
        key = (finding.check, finding.severity)
        counts[key] += 1
        if counts[key] <= MOST_FINDINGS:
            kept.append(_cut(finding))
        else:
            left_out.setdefault(key, finding)
    return (*kept, *(_rest(finding, counts[key] - MOST_FINDINGS) for key, finding in left_out.items()))


def _rest(example: Finding, count: int) -> Finding:
    return Finding(
        check=example.check,
        severity=example.severity,
        message=f"and {count:,} more like these",
        origin=example.origin,
        measured=(("more", float(count)),),
    )


def _cut(finding: Finding) -> Finding:
    return replace(
        finding,
        message=cut(repeatable(finding.message)),
        hint=cut(repeatable(finding.hint)),
        module=cut(finding.module) if finding.module else finding.module,
        tensor=cut(finding.tensor) if finding.tensor else finding.tensor,
        log=finding.log and finding.log[-MOST_OF_LOG:],
    )


def cut(text: str) -> str:
    """At most `MOST_CHARACTERS` of a text, and how many more it has."""
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}… ({len(text) - MOST_CHARACTERS:,} more)"
