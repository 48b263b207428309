"""The verdict on an adapter, and the finding that decided it.

In: an adapter's findings and coverage. Out: a verdict, and the index of a finding. Knows no check by name.

1. An error finding that proves the adapter broken: `failed`. The first in the order of blame decides.
2. Else an error of the base: `error`, and that finding decides. Nothing that was merged into such a base counts.
3. Else any reason why the adapter was not judged whole: `error`.
4. Else `passed`. Nothing vacuous passes: every parameter must have been checked, and at least one.
"""

from __future__ import annotations

from dataclasses import replace

from merge_gate._internal.text import counted
from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.kinds import WITHOUT_SETTING
from merge_gate.judging.not_judged import not_judged
from merge_gate.records.report import AdapterReport, Coverage
from merge_gate.records.terms import Finding, Origin, Severity, Verdict

_UNDECIDED = frozenset(kind.id for kind in WITHOUT_SETTING.values() if kind.severity is Severity.ERROR)
"""Findings that make the verdict `error`."""


def decide(findings: tuple[Finding, ...], coverage: Coverage) -> tuple[Verdict, int | None, tuple[Finding, ...]]:
    """The verdict, the index of the finding that decided it, and the findings.

    They are one more if the coverage alone forbids `passed`.
    """
    what, index = decide_files(findings)
    gap = _gap(coverage) if what is Verdict.PASSED else ""
    if gap:
        return Verdict.ERROR, 0, (not_judged(gap, "please report this, with the adapter's config"), *findings)
    return what, index, findings


def decide_files(findings: tuple[Finding, ...]) -> tuple[Verdict, int | None]:
    """Rules 1 to 3: the verdict on an adapter's files alone, and the index of the finding that decided it."""
    errors = [index for index, finding in enumerate(findings) if finding.severity is Severity.ERROR]
    of_base = [index for index in errors if _is_of_base(findings[index])]
    proven = [
        index
        for index in errors
        if findings[index].check not in _UNDECIDED
        and not _is_of_base(findings[index])
        and not (of_base and findings[index].origin in {Origin.BASE, Origin.MERGE})
    ]
    if proven:
        return Verdict.FAILED, proven[0]
    if not errors:
        return Verdict.PASSED, None
    undecided = [index for index in errors if findings[index].check in _UNDECIDED]
    return Verdict.ERROR, [*of_base, *undecided][0]


def with_decision(adapter: AdapterReport) -> AdapterReport:
    """An adapter's report as it was read from JSON, which has the cause and not the finding that decided."""
    if adapter.verdict is Verdict.PASSED:
        return adapter
    errors = [index for index, finding in enumerate(adapter.findings) if finding.severity is Severity.ERROR]
    causes = [index for index in errors if adapter.findings[index].check == adapter.cause]
    return replace(adapter, decided_by=next(iter([*causes, *errors, *range(len(adapter.findings))]), None))


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
