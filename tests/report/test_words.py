"""The sentences that all formats share."""

from __future__ import annotations

import dataclasses
import html

import pytest

from merge_gate.records.report import Judged, Report
from merge_gate.records.terms import Finding, Origin, Quantization, Severity, Verdict
from merge_gate.report.formats import html_report, junit, summary
from merge_gate.report.wording import words
from tests.support.reports import (
    BASE,
    CRASHED,
    EMPTY,
    FAIL,
    FAILED,
    HALF,
    HALF_FAILED,
    MERGED_NAN,
    NAN,
    OVERFLOW,
    PASS,
    PASSED,
    UNDECIDED,
    WARNED,
    adapter,
    report,
)


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (PASS, "both adapters passed, 1 with warnings"),
        (report(PASSED), "the only adapter passed"),
        (report(WARNED), "the only adapter passed, with warnings"),
        (report(*(adapter(f"a{n}") for n in range(1200))), "all 1,200 adapters passed"),
        (FAIL, "2 of 5 adapters failed, 1 could not be judged"),
        (report(FAILED), "the only adapter failed"),
        (report(CRASHED), "the only adapter could not be judged"),
        (report(FAILED, HALF_FAILED), "both adapters failed"),
        (report(FAILED, complete=False), "the run did not finish; so far 1 adapter failed"),
        (report(PASSED, WARNED, complete=False), "the run did not finish; so far 2 adapters passed, 1 with warnings"),
        (UNDECIDED, "1 of 2 adapters could not be judged, none failed"),
        (report(PASSED, adapter(base=HALF), WARNED), "all 3 merges passed, 1 with warnings"),
        (EMPTY, "the run did not finish and no adapter was judged"),
        (report(), "no adapter was judged"),
        (report(PASSED, FAILED, complete=False), "the run did not finish; so far 1 of 2 adapters failed"),
    ],
)
def test_headline(run: Report, said: str) -> None:
    assert words.headline(run) == said


def at(time: str, place: str = "acme/adapters run 7") -> Judged:
    return Judged(key="0" * 64, at=time, place=place, seconds=0.84, seal="")


def test_a_report_says_when_and_where_its_verdicts_were_reached() -> None:
    """For whoever reads it in two years; what earlier runs reached is said beside it."""
    late, early = adapter("a", judged=at("2026-03-01T12:00:09Z")), adapter("b", judged=at("2026-03-01T12:00:00Z"))
    elsewhere = adapter("c", judged=at("2026-03-01T12:00:00Z", "vm"))
    assert words.judged(report(PASSED, WARNED)) == ""
    assert words.judged(report(early, WARNED)) == "2026-03-01T12:00:00Z, at acme/adapters run 7"
    said = "2026-03-01T12:00:00Z to 2026-03-01T12:00:09Z, at acme/adapters run 7, vm"
    run = report(late, early, elsewhere, PASSED)
    assert words.judged(run) == said
    assert f"| judged | {said} |" in html.unescape(summary.render(run))
    assert f"<dt>judged</dt><dd>{said}</dd>" in html_report.render(run)
    assert f'<property name="judged" value="{said}" />' in junit.render(run)


def test_only_a_pass_is_called_finite() -> None:
    runs = (PASS, FAIL, UNDECIDED, EMPTY, report(PASSED, complete=False))
    assert [run for run in runs if "is finite" in words.advice(run)] == [PASS]
    assert "Do not release" in words.advice(report(FAILED, complete=False))


def test_shards_that_are_not_one_run_clear_nothing() -> None:
    problems = ("shard 2 of 3 is missing",)
    assert "not one whole run" in words.advice(report(PASSED, problems=problems))
    assert "Do not release" in words.advice(report(FAILED, problems=problems))


def test_the_cause_decides_not_the_first_symptom() -> None:
    assert FAILED.findings[0] == MERGED_NAN
    assert words.deciding(FAILED) == NAN
    assert words.others(FAILED) == [MERGED_NAN, FAILED.findings[2]]
    assert words.deciding(WARNED) is None
    assert words.cause(CRASHED) == "not-judged"
    assert words.deciding(adapter(verdict=Verdict.ERROR)) is None


def test_equal_findings_are_not_lost() -> None:
    twice = adapter(verdict=Verdict.FAILED, cause=NAN.check, findings=(NAN, dataclasses.replace(NAN)))
    assert len(words.others(twice)) == 1


def test_worst_first_else_in_order() -> None:
    assert words.worst_first(FAIL.adapters) == [FAILED, HALF_FAILED, CRASHED, PASSED, WARNED]


def test_values_and_place() -> None:
    counted = dataclasses.replace(OVERFLOW, message="broken")
    assert words.values(counted) == "12 +Inf and 3 -Inf among 11,534,336 values, the first at [311, 2040]"
    said = dataclasses.replace(OVERFLOW, message=f"holds {words.values(counted)}")
    assert words.values(said) == "", "the message says it already"
    bare = Finding(check="c", severity=Severity.ERROR, message="in m", origin=Origin.FILE, module="m", tensor="t")
    assert words.values(bare) == ""
    assert words.place(bare) == "t of m"
    assert words.place(NAN) == NAN.tensor
    assert words.unsaid_place(bare) == "t"
    assert words.unsaid_place(dataclasses.replace(bare, message="t is bad")) == ""


def test_every_origin_has_its_words() -> None:
    assert set(words.ORIGINS) == set(Origin)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.842, "0.84 s"),
        (12.34, "12.3 s"),
        (12, "12 s"),
        (245, "4 min 05 s"),
        (3720, "1 h 02 min"),
        (float("nan"), "unknown time"),
        (-1, "unknown time"),
    ],
)
def test_duration(seconds: float, said: str) -> None:
    assert words.duration(seconds) == said


def test_precision() -> None:
    assert words.precision(BASE) == "bfloat16"
    assert words.precision(dataclasses.replace(BASE, quantization=Quantization.BNB_4BIT)) == "bfloat16, bnb-4bit"


def test_hundreds_of_findings_become_one_line_per_check() -> None:
    many = [dataclasses.replace(NAN, tensor=f"t{n}") for n in range(96)]
    assert words.grouped([*many, MERGED_NAN]) == [(many[0], 95), (MERGED_NAN, 0)]
