"""The result of a run in a sentence, and what it means for a release."""

from __future__ import annotations

from dataclasses import replace

import pytest

from merge_gate.judging.checks.table import CHECKS
from merge_gate.records.report import Accepted, AdapterReport, Report, Shard
from merge_gate.records.terms import FailureKind, Finding, Verdict
from merge_gate.report.formats import html_report, junit, sarif, summary, terminal_text
from merge_gate.report.wording import run_result, words
from merge_gate.report.wording.run_result import HARDLY_CHANGED, AdapterState
from tests.support.reports import (
    CRASHED,
    EMPTY,
    FAIL,
    FAILED,
    HALF,
    HALF_FAILED,
    NAN,
    PASS,
    PASSED,
    ROUNDING,
    UNDECIDED,
    WARNED,
    adapter,
    report,
)
from tests.support.wording import Wording


def failed(name: str, check: str, **fields: object) -> AdapterReport:
    finding = replace(NAN, check=check)
    return adapter(name, Verdict.FAILED, cause=check, findings=(finding,), **fields)


def undecided(name: str, check: str) -> AdapterReport:
    return adapter(name, Verdict.ERROR, cause=check, findings=(replace(NAN, check=check),))


@pytest.mark.attempt("M5", "an adapter that failed in one dtype and was not judged in the other", "1 not judged")
def test_what_was_not_judged_in_another_dtype_is_counted() -> None:
    run = report(failed("a", "delta-norm"), replace(undecided("a", "not-judged"), base=HALF), adapter("b"))
    assert "(1 of 3 merges, 1 not judged)" in run_result.headline(run)
    first, second = run_result.adapters_of(run)
    assert (first.state, first.is_undecided, second.is_undecided) == (AdapterState.FAILED, True, False)


def warned(name: str, check: str, *, lost: float = 0.0, **fields: object) -> AdapterReport:
    finding = replace(ROUNDING, check=check, measured=(("lost_share", lost),))
    return adapter(name, findings=(finding,), **fields)


SHARD = Shard(index=2, count=4, plan_sha256="p", versions_sha256="v", entries=1, positions=())
KNOWN = Accepted(owner="ml", until="2027-01-01", reason="known")
RUNS: dict[str, Report] = {
    "passed": PASS,
    "one-passed": report(PASSED),
    "one-warned": report(WARNED),
    "fleet-passed": report(*(adapter(f"a{n}") for n in range(1200))),
    "failed": FAIL,
    "one-failed": report(FAILED),
    "one-undecided": report(CRASHED),
    "both-failed": report(FAILED, HALF_FAILED),
    "unfinished-failed": report(FAILED, complete=False),
    "unfinished-passed": report(PASSED, WARNED, complete=False),
    "undecided": UNDECIDED,
    "dtypes": report(PASSED, adapter(base=HALF), WARNED),
    "empty": EMPTY,
    "none": report(),
    "unfinished-one-failed": report(PASSED, FAILED, complete=False),
    "accepted": report(PASSED, replace(FAILED, accepted=KNOWN)),
    "one-accepted": report(replace(FAILED, accepted=KNOWN)),
    "empty-shard": report(shard=SHARD),
    "shards-passed": report(PASSED, problems=("shard 2 of 3 is missing",)),
    "known-and-failed": report(PASSED, replace(FAILED, accepted=KNOWN), HALF_FAILED),
    "known-and-undecided": report(PASSED, replace(FAILED, accepted=KNOWN), CRASHED),
    "known-twice": report(
        PASSED,
        WARNED,
        replace(FAILED, accepted=KNOWN),
        replace(HALF_FAILED, accepted=replace(KNOWN, until="2026-12-31")),
    ),
    "dtypes-failed": report(FAILED, replace(FAILED, base=HALF), PASSED, adapter(base=HALF), CRASHED),
    "one-dtype-failed": report(adapter("a"), failed("a", "merged-nonfinite", base=HALF)),
    "one-refused": report(failed("a", "pickle-refused")),
    "refused": report(PASSED, failed("a", "pickle-refused"), failed("b", "config-unsafe")),
    "not-mergeable": report(PASSED, failed("a", "not-mergeable")),
    "unexpected": report(failed("a", "expectation-failed"), failed("b", "base-mismatch")),
    "every-kind": report(
        PASSED,
        FAILED,
        HALF_FAILED,
        failed("c", "pickle-refused"),
        failed("d", "not-mergeable"),
        failed("e", "expectation-failed"),
    ),
    "broken-base": report(PASSED, failed("a", "base-nonfinite"), failed("b", "base-nonfinite")),
    "broken-base-and-adapter": report(failed("a", "base-nonfinite"), failed("b", "adapter-nonfinite")),
    "not-published": report(PASSED, undecided("a", "not-published")),
    "only-not-published": report(undecided("a", "not-published")),
    "not-judged-and-not-published": report(undecided("a", "not-judged"), undecided("b", "not-published")),
    "hardly-changed": report(warned("a", "rounding-loss", lost=0.98)),
    "one-hardly-changed": report(PASSED, warned("a", "rounding-loss", lost=0.98), warned("b", "headroom")),
    "hardly-changed-dtypes": report(
        warned("a", "rounding-loss", lost=0.98),
        warned("a", "rounding-loss", lost=0.98, base=HALF),
        warned("b", "rounding-loss", lost=0.98),
        warned("b", "rounding-loss", lost=0.6, base=HALF),
    ),
    "much-lost": report(warned("a", "rounding-loss", lost=0.6)),
    "replaced": report(PASSED, warned("a", "delta-norm"), warned("b", "delta-norm")),
    "other-warnings": report(PASSED, warned("a", "headroom"), warned("b", "base-mismatch")),
    "files-passed": report(PASSED, files_only=True),
    "shards-failed": report(FAILED, problems=("shard 2 of 3 is missing",)),
}


@pytest.mark.parametrize("name", RUNS)
def test_headline_and_advice(name: str, wording: Wording) -> None:
    wording(f"{run_result.verdict_line(RUNS[name])}\n> {run_result.advice(RUNS[name])}")


def test_a_pass_with_warnings_says_so_in_every_format() -> None:
    run = report(warned("a", "rounding-loss", lost=0.98), PASSED)
    line = "PASS, but 1 adapter hardly differs from its base in bfloat16"
    assert run_result.verdict_line(run).startswith(line)
    for render in (summary.render, html_report.render, sarif.render, lambda run: terminal_text.render(run, "out")):
        assert line in " ".join(render(run).replace('<span class="result">PASS</span>', "PASS").split())
    assert "PASS, but" not in run_result.verdict_line(report(PASSED))


def test_a_share_at_the_limit_is_not_hardly_changed() -> None:
    at = run_result.verdict_line(report(warned("a", "rounding-loss", lost=HARDLY_CHANGED)))
    above = run_result.verdict_line(report(warned("a", "rounding-loss", lost=HARDLY_CHANGED + 0.01)))
    assert at != above


def test_the_effect_counts_and_not_the_norm() -> None:
    (norm,) = warned("a", "rounding-loss", lost=0.98).findings
    measured = replace(norm, measured=(("rounding_change", 0.6), *norm.measured))
    much_lost = run_result.verdict_line(RUNS["much-lost"])
    assert run_result.verdict_line(report(adapter("a", findings=(measured,)))) == much_lost


@pytest.mark.parametrize(
    ("entries", "state"),
    [
        ((PASSED,), AdapterState.PASSED),
        ((PASSED, FAILED), AdapterState.FAILED),
        ((CRASHED, FAILED), AdapterState.FAILED),
        ((PASSED, CRASHED), AdapterState.ERROR),
        ((PASSED, replace(FAILED, accepted=KNOWN)), AdapterState.ACCEPTED),
        ((FAILED, replace(FAILED, accepted=KNOWN)), AdapterState.FAILED),
    ],
)
def test_the_worst_entry_is_the_state_of_an_adapter(entries: tuple[AdapterReport, ...], state: AdapterState) -> None:
    (one,) = run_result.adapters_of(report(*(replace(entry, name="a") for entry in entries)))
    assert one.state is state


def test_each_kind_of_failure_has_its_checks() -> None:
    kinds = {kind: [check for check, row in CHECKS.items() if row.failure is kind] for kind in FailureKind}
    assert set(kinds[FailureKind.REFUSED]) == {"pickle-refused", "config-unsafe"}
    assert kinds[FailureKind.NOT_MERGEABLE] == ["not-mergeable", "merge-differs"]
    assert set(kinds[FailureKind.UNEXPECTED]) == {"base-mismatch", "expectation-failed"}


@pytest.mark.parametrize(("check", "kind"), [("pickle-refused", FailureKind.REFUSED), ("gone", FailureKind.BROKEN)])
def test_the_kind_follows_from_the_cause_in_older_reports(check: str, kind: FailureKind) -> None:
    old = failed("a", check)
    assert old.failure is None
    assert words.failure(old) is kind
    assert words.failure(replace(old, failure=FailureKind.UNEXPECTED)) is FailureKind.UNEXPECTED
    assert words.failure(PASSED) is words.failure(CRASHED) is None


@pytest.mark.parametrize("check", ["pickle-refused", "not-mergeable", "expectation-failed"])
def test_every_format_names_the_kind(check: str) -> None:
    run = report(failed("a", check), FAILED)
    kind = words.FAILURES[CHECKS[check].failure]
    for text in (summary.render(run), html_report.render(run), junit.render(run), sarif.render(run)):
        assert kind in text
    assert kind in terminal_text.render(run, "out")
    assert Finding is type(run.adapters[0].findings[0])
