"""The sentences that all formats share."""

from __future__ import annotations

import dataclasses
import html

import pytest

from merge_gate.judging.checks.check import FOLLOWS
from merge_gate.records.measured import Forward
from merge_gate.records.report import Accepted, Judged
from merge_gate.records.terms import Finding, Origin, Quantization, Severity, Verdict
from merge_gate.report.formats import html_report, junit, summary, terminal_text
from merge_gate.report.wording import words
from tests.support.reports import (
    BASE,
    CRASHED,
    FAIL,
    FAILED,
    HALF,
    HALF_FAILED,
    MERGED_NAN,
    NAN,
    OVERFLOW,
    PASS,
    PASSED,
    RAN,
    WARNED,
    adapter,
    report,
)
from tests.support.wording import Wording

KNOWN = Accepted(owner="ml", until="2027-01-01", reason="known")


def test_what_stands_beside_a_verdict(wording: Wording) -> None:
    wording(words.cached(PASS), *words.marks(WARNED), *words.marks(dataclasses.replace(FAILED, accepted=KNOWN)))
    wording(words.title(FAILED), words.title(CRASHED), words.title(PASSED))


def at(time: str, place: str = "acme/adapters run 7") -> Judged:
    return Judged(key="0" * 64, at=time, place=place, seconds=0.84)


def test_a_report_says_when_and_where_its_verdicts_were_reached(wording: Wording) -> None:
    """For whoever reads it in two years; what earlier runs reached is said beside it."""
    late, early = adapter("a", judged=at("2026-03-01T12:00:09Z")), adapter("b", judged=at("2026-03-01T12:00:00Z"))
    elsewhere = adapter("c", judged=at("2026-03-01T12:00:00Z", "vm"))
    assert words.judged(report(PASSED, WARNED)) == ""
    run = report(late, early, elsewhere, PASSED)
    said = words.judged(run)
    wording(words.judged(report(early, WARNED)), said)
    assert f"| judged | {said} |" in html.unescape(summary.render(run))
    assert f"<dt>judged</dt><dd>{said}</dd>" in html_report.render(run)
    assert f'<property name="judged" value="{said}" />' in junit.render(run)


def test_a_run_of_the_model_is_shown_in_one_line(wording: Wording) -> None:
    """In each format for people. A share of bfloat16's largest value would tell nothing."""
    half = adapter("half", base=HALF, forward=RAN)
    wide = adapter("wide", forward=dataclasses.replace(RAN, largest_allowed=3.4e38))
    broken = adapter(
        "broken",
        forward=Forward(
            ran=True,
            modules=8,
            modules_run=5,
            not_run=("vision.q_proj",),
            nonfinite_module="model.norm",
            nonfinite_origin=Origin.BASE,
        ),
    )
    failed = adapter("failed", Verdict.FAILED, cause="no-effect", findings=(NAN,), forward=RAN)
    quiet = adapter("quiet", forward=Forward(why_not="the base is streamed"))
    run = report(half, wide, broken, quiet, failed, adapter("old"))
    wording(*(words.forward(one) for one in (half, wide, broken, quiet, adapter("bare", forward=Forward(ran=True)))))
    itself = adapter("itself", forward=Forward(ran=True, nonfinite_module="", largest=390.0, largest_module=""))
    assert words.forward(itself).count("the model itself") == 2
    assert words.forward(adapter("old")) == ""
    page = html.unescape(html_report.render(run).replace("<wbr>", ""))
    text, markdown = terminal_text.render(run, "", width=400), summary.render(run)
    for one in (half, wide, broken):
        assert words.forward(one) in page
    assert page.count("models, on made-up inputs") == 5, "one that failed or did not run is on the page alone"
    assert "the base is streamed" not in text + markdown
    assert (text.count("ran on made-up inputs"), markdown.count("ran on made-up inputs")) == (1, 3)
    rest = "(2 other runs stayed further from the limit)"
    assert f"broken ({words.precision(broken.base)}) {words.forward(broken)} {rest}\n" in text


def test_a_terminal_shows_the_run_closest_to_its_limit() -> None:
    low, high = (adapter(name, forward=dataclasses.replace(RAN, largest=at)) for name, at in (("a", 9.0), ("b", 99.0)))
    wide = adapter("c", forward=dataclasses.replace(RAN, largest=9e9, largest_allowed=3.4e38))
    assert f"b ({words.precision(high.base)}) ran on" in terminal_text.render(report(low, high, wide), "", width=400)
    assert "other run" not in terminal_text.render(report(low), "", width=400)
    assert "ran on" not in terminal_text.render(report(adapter("quiet")), "", width=400)


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


def test_values_and_place(wording: Wording) -> None:
    counted = dataclasses.replace(OVERFLOW, message="broken")
    wording(words.values(counted))
    said = dataclasses.replace(OVERFLOW, message=f"holds {words.values(counted)}")
    assert words.values(said) == "", "the message says it already"
    bare = Finding(check="c", severity=Severity.ERROR, message="in m", origin=Origin.FILE, module="m", tensor="t")
    assert words.values(bare) == ""
    wording(words.place(bare))
    assert words.place(NAN) == NAN.tensor
    assert words.place(bare, unless_in="in m") == words.place(bare)
    assert words.place(bare, unless_in="t is bad") == ""


def test_an_activation_is_not_in_the_adapters_tensors() -> None:
    """The message names the module already; in the terminal, `where` names it again."""
    louder = Finding(
        check="activation-nonfinite", severity=Severity.ERROR, message="lm_head returns NaN", origin=Origin.ADAPTER,
        module="lm_head",
    )  # fmt: skip
    assert words.origin(louder) == "in what this module returns"
    assert words.origin(dataclasses.replace(louder, module="")) == "in what the model itself returns"
    assert words.origin(dataclasses.replace(louder, origin=Origin.BASE)) == words.ORIGINS[Origin.BASE]
    shown = terminal_text.render(report(adapter("loud", Verdict.FAILED, cause=louder.check, findings=(louder,))), "")
    assert "  where   lm_head\n          in what this module returns\n" in shown


def test_every_origin_has_its_words(wording: Wording) -> None:
    assert set(words.ORIGINS) == set(Origin)
    wording(*(f"{origin}: {said}" for origin, said in words.ORIGINS.items()))


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
    assert words.grouped([*many, MERGED_NAN]) == [(many[0], tuple(many[1:])), (MERGED_NAN, ())]


@pytest.mark.parametrize(
    ("origin", "hint", "told"),
    [
        (Origin.MERGE, f"{FOLLOWS} the adapter's own tensors", ("in the merged model", "because")),
        (Origin.ADAPTER, f"{FOLLOWS} the same names", (words.ORIGINS[Origin.ADAPTER], "because")),
        (Origin.MERGE, "lower lora_alpha", (words.ORIGINS[Origin.MERGE], "to do")),
    ],
)
def test_what_follows_from_another_finding_is_no_cause(origin: Origin, hint: str, told: tuple[str, str]) -> None:
    finding = dataclasses.replace(NAN, origin=origin, hint=hint)
    assert (words.origin(finding), words.hint_label(finding)) == told
