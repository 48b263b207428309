"""The order of all findings on an adapter: the first one is the cause."""

from __future__ import annotations

from itertools import permutations

import pytest

from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.not_judged import NOT_JUDGED
from merge_gate.records.measured import Evidence
from merge_gate.records.refusals import NotJudged
from merge_gate.records.terms import Finding, Origin, Severity
from tests.support.judging.cases import evidence, files, judge, reason, spec

FIRST, *_, LAST = CHECKS
UNKNOWN = "file-cursed"
"""No check of the table."""


def finding(check: str, severity: Severity = Severity.ERROR, message: str = "m") -> Finding:
    return Finding(check=check, severity=severity, message=message, origin=Origin.FILE)


def order(findings: tuple[Finding, ...], evidence_: Evidence | None) -> list[str]:
    return [one.check for one in judge(spec(), files(findings=findings), evidence_)]


@pytest.mark.parametrize("evidence_", [None, evidence()], ids=["files", "merge"])
@pytest.mark.parametrize("checks", [*permutations((FIRST, LAST, UNKNOWN))], ids="-".join)
def test_what_the_table_does_not_know_is_the_cause(checks: tuple[str, ...], evidence_: Evidence | None) -> None:
    """A finding without a row must not hide behind others, whatever comes first."""
    assert order(tuple(map(finding, checks)), evidence_) == [UNKNOWN, FIRST, LAST]


@pytest.mark.parametrize("checks", [(UNKNOWN, NOT_JUDGED), (NOT_JUDGED, UNKNOWN)], ids="-".join)
def test_what_the_table_does_not_know_keeps_its_place(checks: tuple[str, ...]) -> None:
    assert order((finding(LAST), *map(finding, checks)), None) == [*checks, LAST]


def test_the_severity_counts_more_than_the_check() -> None:
    findings = (
        finding(UNKNOWN, Severity.NOTE),
        finding(FIRST, Severity.WARNING),
        finding(UNKNOWN, Severity.WARNING),
        finding(LAST),
    )
    assert judge(spec(), files(findings=findings), None) == tuple(findings[index] for index in (3, 2, 1, 0))


def test_findings_of_one_check_keep_their_order() -> None:
    findings = tuple(finding(LAST, message=message) for message in ("b", "a", "c"))
    assert judge(spec(), files(findings=findings), None) == findings


def test_a_refused_merge_is_blamed_in_its_place() -> None:
    refused = evidence(refusal=reason("targets_not_found", targets=("query",), of_base=("q_proj",)), merges=())
    around = ("expectation-failed", "file-corrupt")
    assert order(tuple(map(finding, around)), refused) == ["file-corrupt", "targets-not-found", "expectation-failed"]


def test_a_merge_that_was_not_judged_comes_before_every_check() -> None:
    refused = evidence(refusal=NotJudged(message="gone"), merges=())
    assert order((finding(LAST), finding(FIRST)), refused) == [NOT_JUDGED, FIRST, LAST]
