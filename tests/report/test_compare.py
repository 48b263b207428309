"""Two reports: what broke is never called anything else, and what only looks different is not a change."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given

from merge_gate._internal.errors import ExitCode
from merge_gate.records.terms import Verdict
from merge_gate.report.stored.stored_report import Changes, Kind, compare, render_markdown, render_text
from tests.support.reports import (
    BASE,
    CRASHED,
    ENVIRONMENT,
    FAIL,
    FAILED,
    HALF,
    NAN,
    OVERFLOW,
    PASS,
    PASSED,
    ROUNDING,
    WARNED,
    adapter,
    hostile_reports,
    lines_of,
    report,
    runner_obeys,
)
from tests.support.wording import Wording

BROKEN = dataclasses.replace(PASSED, verdict=Verdict.FAILED, cause=NAN.check, findings=(NAN,))
UNDECIDED = dataclasses.replace(CRASHED, name="support")
WORN = dataclasses.replace(PASSED, findings=(ROUNDING,))


def kinds(changes: Changes) -> list[tuple[str, str]]:
    return [(change.kind.value, change.adapter.name) for change in changes.changes]


@pytest.mark.parametrize(
    ("old", "new", "kind", "code"),
    [
        (PASSED, BROKEN, Kind.BROKE, ExitCode.FAIL),
        (PASSED, UNDECIDED, Kind.BROKE, ExitCode.FAIL),
        (None, BROKEN, Kind.BROKE, ExitCode.FAIL),
        (UNDECIDED, BROKEN, Kind.WORSE, ExitCode.FAIL),
        (PASSED, WORN, Kind.WORSE, ExitCode.FAIL),
        (BROKEN, dataclasses.replace(BROKEN, findings=(NAN, ROUNDING)), Kind.WORSE, ExitCode.FAIL),
        (BROKEN, dataclasses.replace(BROKEN, findings=(OVERFLOW,)), Kind.OTHER, ExitCode.FAIL),
        (BROKEN, PASSED, Kind.FIXED, ExitCode.PASS),
        (WORN, PASSED, Kind.BETTER, ExitCode.PASS),
        (PASSED, None, Kind.VANISHED, ExitCode.PASS),
        (None, PASSED, Kind.NEW, ExitCode.PASS),
    ],
)
def test_what_happened_to_an_adapter(old: Any, new: Any, kind: Kind, code: ExitCode) -> None:
    same = adapter("same")
    changes = compare(report(same, *filter(None, [old])), report(same, *filter(None, [new])))
    assert (kinds(changes), changes.unchanged) == ([(kind.value, "support")], 1)
    assert changes.exit_code is code
    assert f"1 {kind}" in render_text(changes).splitlines()[-1]


def test_time_place_and_wording_are_no_change() -> None:
    moved = dataclasses.replace(WARNED, line=90, seconds=7.0, findings=(dataclasses.replace(ROUNDING, message="x"),))
    assert compare(report(WARNED), report(moved)).changes == ()


def test_another_dtype_is_another_entry() -> None:
    both = report(PASSED, dataclasses.replace(BROKEN, base=HALF))
    assert kinds(compare(both, report(PASSED))) == [("vanished", "support")]


def test_a_base_is_the_same_however_its_path_is_written() -> None:
    one, other = (dataclasses.replace(PASSED, base=dataclasses.replace(BASE, model=model)) for model in ("./b", "b/"))
    assert compare(report(one), report(other)).changes == ()
    elsewhere = dataclasses.replace(PASSED, base=dataclasses.replace(BASE, model="c"))
    assert [change.kind for change in compare(report(one), report(elsewhere)).changes] == [Kind.VANISHED, Kind.NEW]


def test_a_newer_run_that_did_not_finish_proves_nothing(wording: Wording) -> None:
    assert compare(report(PASSED), report(PASSED, complete=False)).exit_code is ExitCode.ERROR
    wording(render_text(compare(report(PASSED), report(PASSED, complete=False))))


def test_versions_are_named() -> None:
    newer = dataclasses.replace(ENVIRONMENT, peft="0.22.0", bitsandbytes="0.51.0")
    text = render_text(compare(PASS, dataclasses.replace(PASS, environment=newer)))
    assert text.splitlines() == [
        "version    peft 0.21.2 → 0.22.0",
        "version    bitsandbytes absent → 0.51.0",
        "2 unchanged.",
    ]


def test_an_upgrade_that_breaks_an_adapter_is_stopped() -> None:
    newer = dataclasses.replace(report(BROKEN), environment=dataclasses.replace(ENVIRONMENT, transformers="6.0.0"))
    changes = compare(report(PASSED), newer)
    assert changes.exit_code is ExitCode.FAIL
    lines = render_text(changes).splitlines()
    assert lines[0] == "broke      support (bfloat16): passed → failed (adapter-nonfinite)"
    assert "version    transformers 5.24.0 → 6.0.0" in lines


def test_word_for_word() -> None:
    changes = compare(report(PASSED, FAILED), report(BROKEN, dataclasses.replace(PASSED, name="billing")))
    assert max(map(len, render_text(changes, width=70).splitlines())) <= 70
    text = render_text(changes, width=200)
    assert text.splitlines() == [
        "broke      support (bfloat16): passed → failed (adapter-nonfinite)",
        f"           adapter-nonfinite: {NAN.message}",
        "fixed      billing (bfloat16): failed (adapter-nonfinite) → passed",
        "1 broke, 1 fixed, 0 unchanged.",
    ]


@given(hostile_reports(), hostile_reports())
def test_any_two_reports(old: Any, new: Any) -> None:
    changes = compare(old, new)
    for text in (render_text(changes), render_markdown(changes)):
        assert not any(runner_obeys(line) for line in lines_of(text))
        assert all(line.isprintable() for line in lines_of(text))


@given(hostile_reports())
def test_a_report_is_as_itself(run: Any) -> None:
    assert compare(run, run).changes == ()


def test_markdown_is_a_table() -> None:
    markdown = render_markdown(compare(report(PASSED), FAIL))
    assert markdown.startswith("## 3 broke, 1 new, 1 unchanged")
    assert "| broke | `billing` (bfloat16) | absent → failed (adapter-nonfinite) |" in markdown
