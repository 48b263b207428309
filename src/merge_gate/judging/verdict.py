"""Findings → verdict and cause.

In: an adapter's findings and coverage. Out: two values, and why. Knows no check by name except one.

1. An error finding that proves the adapter broken: `failed`. The first in the order of blame is the cause.
2. Else an error of the base: `error`, with that check as the cause. Nothing that was merged into such a base counts.
3. Else anything that kept the adapter from being judged whole: `error`.
4. Else `passed`. Nothing vacuous passes: every parameter must have been checked, and at least one.
"""

from __future__ import annotations

from merge_gate.judging.checks.table import CHECKS, NOT_JUDGED
from merge_gate.judging.undecided import undecided
from merge_gate.records.report import Coverage
from merge_gate.records.terms import Finding, Origin, Severity, Verdict
from merge_gate.text import counted


def decide(findings: tuple[Finding, ...], coverage: Coverage) -> tuple[Verdict, str | None, tuple[Finding, ...]]:
    """The verdict, its cause, and the findings with one more where coverage alone forbids `passed`."""
    what, cause = decide_files(findings)
    gap = _gap(coverage) if what is Verdict.PASSED else ""
    if gap:
        return Verdict.ERROR, NOT_JUDGED, (undecided(gap, "please report this, with the adapter's config"), *findings)
    return what, cause, findings


def decide_files(findings: tuple[Finding, ...]) -> tuple[Verdict, str | None]:
    """The verdict on an adapter's files alone, and its cause: rules 1 to 3. `passed` says nothing of values."""
    errors = [finding for finding in findings if finding.severity is Severity.ERROR]
    of_base = [finding.check for finding in errors if _is_of_base(finding)]
    proven = [
        finding.check
        for finding in errors
        if finding.check != NOT_JUDGED
        and not _is_of_base(finding)
        and not (of_base and finding.origin in {Origin.BASE, Origin.MERGE})
    ]
    if proven:
        return Verdict.FAILED, proven[0]
    return (Verdict.ERROR, [*of_base, NOT_JUDGED][0]) if errors else (Verdict.PASSED, None)


def _is_of_base(finding: Finding) -> bool:
    return finding.check in CHECKS and CHECKS[finding.check].is_of_base


def _gap(coverage: Coverage) -> str:
    if coverage.parameters_checked != coverage.parameters_total:
        return (
            f"only {coverage.parameters_checked:,} of {counted(coverage.parameters_total, 'parameter')} of the merged "
            "model were checked"
        )
    if not coverage.parameters_total:
        return "the merged model has no parameters that could be checked"
    if not coverage.modules_merged:
        return "no module was merged"
    return ""
