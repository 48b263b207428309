"""However much an adapter brings, the report stays readable, and says how much there was."""

from __future__ import annotations

import dataclasses

from merge_gate.judging.bounds import MOST_CHARACTERS, MOST_FINDINGS, bounded, cut
from merge_gate.records.terms import Finding, Origin, Severity
from tests.support.wording import Wording


def finding(check: str = "config-invalid", message: str = "m", severity: Severity = Severity.ERROR) -> Finding:
    return Finding(check=check, severity=severity, message=message, origin=Origin.CONFIG)


def test_what_is_few_and_short_stays_as_it_is() -> None:
    few = tuple(finding(message=str(number)) for number in range(MOST_FINDINGS))
    assert bounded(few) == few


def test_what_is_left_out_is_counted_by_check_and_severity(wording: Wording) -> None:
    many = [finding() for _ in range(MOST_FINDINGS + 7)]
    warnings = [finding(severity=Severity.WARNING) for _ in range(3)]
    found = bounded([*many, *warnings, finding("file-missing")])
    assert len(found) == MOST_FINDINGS + 3 + 1 + 1
    assert found[-1].measured == (("more", 7.0),)
    wording(found[-1].message)
    assert (found[-1].check, found[-1].severity) == ("config-invalid", Severity.ERROR)


def test_long_texts_are_cut_and_what_is_left_out_is_counted() -> None:
    (cut,) = bounded([finding(message="x" * 1_000_000)])
    assert len(cut.message) < MOST_CHARACTERS + 40
    assert "998,000" in cut.message


def test_a_text_of_just_the_length_is_whole(wording: Wording) -> None:
    assert cut("x" * MOST_CHARACTERS) == "x" * MOST_CHARACTERS
    longer = cut("x" * (MOST_CHARACTERS + 1))
    assert longer.startswith("x" * MOST_CHARACTERS + "…")
    wording(longer.strip("x"))


def test_every_text_of_a_finding_is_cut_and_nothing_else() -> None:
    long = "x" * (MOST_CHARACTERS + 3)
    one = dataclasses.replace(finding(message=long), hint=long, module=long, tensor=long, nan=3)
    cut_long = cut(long)
    assert bounded([one]) == (
        dataclasses.replace(one, message=cut_long, hint=cut_long, module=cut_long, tensor=cut_long),
    )
    assert bounded([dataclasses.replace(one, module="", tensor="")])[0].module == ""
    assert bounded([dataclasses.replace(one, module="", tensor="")])[0].tensor == ""


def test_the_rest_is_the_first_left_out_without_its_words() -> None:
    shown = [finding(message=str(number)) for number in range(MOST_FINDINGS)]
    more = [dataclasses.replace(finding(), origin=Origin.ADAPTER, module="m"), finding(), finding()]
    *_, rest = bounded([*shown, *more])
    assert rest == Finding(
        check="config-invalid",
        severity=Severity.ERROR,
        message=rest.message,
        origin=Origin.ADAPTER,
        measured=(("more", 3.0),),
    )
