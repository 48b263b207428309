"""The report of `merge-gate verify` in each format: it speaks of a model, and not of broken adapters."""

import json
import re
from dataclasses import replace

import pytest

from merge_gate.judging.kinds import ANSWERS, finding
from merge_gate.records.report import AdapterReport, Report
from merge_gate.records.terms import FailureKind, Finding, Severity, Verdict
from merge_gate.report.formats import html_report, junit, sarif, summary, terminal_text
from merge_gate.report.formats.html_report import chain
from merge_gate.report.wording import run_result
from tests.support.reports import CRASHED, FAILED, adapter, report
from tests.support.wording import Wording

TWICE = finding("applied-twice", "the delta is in all 4 tensors 2 times", tensor="layers.0.q_proj.weight")
EXACT = finding("exact", "4 merged tensors and 25 other tensors have the expected bits")
RENAMED = finding("renamed", "6 tensors of the base are stored under other names")
ALLOWED = replace(RENAMED, severity=Severity.NOTE)


def compared(verdict: Verdict, *findings: Finding, **fields: object) -> Report:
    settings = {"name": "./merged", "source": "./merged", "compared_with": "./lora"} | fields
    wrong = {"cause": findings[0].check, "failure": FailureKind.UNEXPECTED} if verdict is Verdict.FAILED else {}
    return report(adapter(verdict=verdict, findings=findings, **settings | wrong), is_comparison=True)


REPORTS = {
    "wrong": compared(Verdict.FAILED, TWICE, RENAMED),
    "right": compared(Verdict.PASSED, EXACT, ALLOWED),
    "allowed": compared(Verdict.PASSED, ALLOWED),
    "digests": compared(Verdict.PASSED, finding("as-published", "7 files have the digests"), compared_with=None),
    "gate": report(replace(FAILED, compared_with="./lora"), is_comparison=True),
    "error": report(replace(CRASHED, compared_with="./lora"), is_comparison=True),
}


@pytest.mark.parametrize("name", REPORTS)
def test_the_terminal_says_what_the_model_is(name: str, wording: Wording) -> None:
    wording(terminal_text.render(REPORTS[name], "out"))


@pytest.mark.parametrize("name", ["wrong", "right"])
def test_no_format_speaks_of_a_broken_adapter(name: str) -> None:
    run = REPORTS[name]
    texts = [one.render(run) for one in (html_report, junit, sarif, summary)] + [terminal_text.render(run, "out")]
    for text in texts:
        shown = re.sub(
            r"<style>.*?</style>|<script.*?</script>|<section aria-labelledby=\"checks\">.*?</section>",
            "",
            text,
            flags=re.DOTALL,
        )
        if text.startswith("{"):
            shown = json.dumps(json.loads(text)["runs"][0]["results"])
        assert "broken" not in re.sub(r'class="[^"]*"', "", shown)
        assert "in the merge of the two" not in shown
        assert "./merged" in shown
        assert "renamed" in shown


def test_each_answer_has_a_phrase_and_a_rule() -> None:
    rules = json.loads(sarif.render(REPORTS["wrong"]))["runs"][0]["tool"]["driver"]["rules"]
    assert ANSWERS.keys() <= {rule["id"] for rule in rules}
    usual = json.loads(sarif.render(report(FAILED)))["runs"][0]["tool"]["driver"]["rules"]
    assert not ANSWERS.keys() & {rule["id"] for rule in usual}
    for kind in ANSWERS:
        verdict = Verdict.PASSED if ANSWERS[kind].is_good else Verdict.FAILED
        assert run_result.headline(compared(verdict, finding(kind, "why"))) == f"the model {ANSWERS[kind].phrase}"


def test_a_result_points_at_the_model_and_is_a_rule() -> None:
    (run,) = json.loads(sarif.render(REPORTS["wrong"]))["runs"]
    first = run["results"][0]
    assert run["tool"]["driver"]["rules"][first["ruleIndex"]]["id"] == "applied-twice"
    assert (first["properties"]["model"], first["properties"]["failure"]) == ("./merged", "unexpected")


def test_an_allowed_difference_is_shown_as_one() -> None:
    for text in (summary.render(REPORTS["right"]), junit.render(REPORTS["right"])):
        assert re.search(r"allowed `?renamed", text)
        assert re.search(r"note `?exact", text)
    assert '<span class="level">allowed</span> <code>renamed</code>' in html_report.render(REPORTS["right"])


def test_the_model_is_the_last_link_of_the_chain() -> None:
    (wrong,), (right,) = (REPORTS[name].adapters for name in ("wrong", "right"))
    assert [(name, outcome) for name, outcome, _ in chain(wrong)][2:] == [
        ("merge", "sound"), ("bfloat16", "unknown"), ("model", "broken"),
    ]  # fmt: skip
    assert chain(right)[-1][2] == "exact, renamed"


def test_a_report_of_another_writer_has_a_headline_alone() -> None:
    for verdict in Verdict:
        one = AdapterReport(
            **{name: getattr(FAILED, name) for name in ("name", "source", "base", "line", "column")},
            peft_type=None,
            verdict=verdict,
        )
        run = report(one, is_comparison=True)
        assert run_result.verdict_line(run)
        assert run_result.advice(run)
