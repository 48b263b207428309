"""However much an adapter brings, the report stays readable, and says how much there was."""

from __future__ import annotations

from merge_gate.judging.bounds import MOST_CHARACTERS, MOST_FINDINGS, bounded
from merge_gate.records.terms import Finding, Origin, Severity


def finding(check: str = "config-invalid", message: str = "m", severity: Severity = Severity.ERROR) -> Finding:
    return Finding(check=check, severity=severity, message=message, origin=Origin.CONFIG)


def test_what_is_few_and_short_stays_as_it_is() -> None:
    few = tuple(finding(message=str(number)) for number in range(MOST_FINDINGS))
    assert bounded(few) == few


def test_what_is_left_out_is_counted_by_check_and_severity() -> None:
    many = [finding() for _ in range(MOST_FINDINGS + 7)]
    warnings = [finding(severity=Severity.WARNING) for _ in range(3)]
    found = bounded([*many, *warnings, finding("file-missing")])
    assert len(found) == MOST_FINDINGS + 3 + 1 + 1
    assert found[-1].message == "and 7 more like these"
    assert (found[-1].check, found[-1].severity) == ("config-invalid", Severity.ERROR)


def test_bounding_twice_keeps_the_count() -> None:
    once = bounded(finding() for _ in range(1000))
    assert bounded(once) == once


def test_long_texts_are_cut_and_what_is_left_out_is_counted() -> None:
    (cut,) = bounded([finding(message="x" * 1_000_000)])
    assert len(cut.message) < MOST_CHARACTERS + 40
    assert cut.message.endswith("(998,000 more)")
