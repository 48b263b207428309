"""The first baseline: an entry for each failure, which the gate takes once somebody answers for it."""

from __future__ import annotations

import datetime as dt
import html
from dataclasses import replace

import pytest

from merge_gate._internal.errors import ConfigError
from merge_gate.config.load_config import build_baseline
from merge_gate.config.yaml_document import read_yaml
from merge_gate.judging.baseline import accept
from merge_gate.records.report import Report
from merge_gate.records.terms import Acceptance, Result
from merge_gate.report.formats.json_report import read
from merge_gate.report.formats.terminal_text import render as terminal
from merge_gate.report.stored.report_files import FORMATS
from merge_gate.report.stored.stored_report import first_baseline
from merge_gate.report.wording import run_result, words
from tests.support.reports import ATTACKS, FAIL, FAILED, PASS, PASSED, report
from tests.support.wording import Wording

DAY = dt.date(2026, 3, 1)


def filled(text: str) -> str:
    return text.replace('reason: ""', 'reason: "known"').replace('owner: ""', 'owner: "team-a"')


def test_a_first_baseline_accepts_what_failed_once_filled_in(wording: Wording) -> None:
    text = first_baseline(report(FAILED, PASSED), DAY)
    with pytest.raises(ConfigError) as caught:
        build_baseline(read_yaml(text, "known.yml"))
    wording(caught.value)
    known = build_baseline(read_yaml(filled(text), "known.yml"))
    lines, _ = accept(report(FAILED, PASSED).adapters, known, DAY)
    assert report(*lines).result is Result.PASS
    assert known[0].until == "2026-05-30"


def test_one_adapter_in_two_dtypes_is_one_entry_for_each_cause() -> None:
    text = first_baseline(FAIL, DAY)
    assert text.count("- adapter:") == 2
    assert "not-judged" not in text


def test_nothing_failed() -> None:
    assert build_baseline(read_yaml(first_baseline(PASS, DAY), "known.yml")) == ()


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_name_stays_in_its_comment(attack: str) -> None:
    text = filled(first_baseline(report(replace(FAILED, name=attack)), DAY))
    (known,) = build_baseline(read_yaml(text, "known.yml"))
    assert known.cause == "adapter-nonfinite"


def accepted(*, today: dt.date = DAY) -> Report:
    """A report whose only failure is in the baseline, and a baseline with one entry that matches nothing."""
    (known,) = build_baseline(read_yaml(filled(first_baseline(report(FAILED), DAY)), "known.yml"))
    stranger = replace(known, adapter="0" * 64, cause="no-effect")
    lines, entries = accept([FAILED, PASSED], [known, stranger], today)
    return report(*lines, baseline=entries)


def ending(found: Report) -> str:
    """What is said of the first entry that is off, behind its owner."""
    return words.baseline(found)[0].rpartition(" by team-a ")[2]


@pytest.mark.parametrize("name", [*FORMATS, "terminal"])
def test_what_is_accepted_is_in_every_output_and_never_passes(name: str) -> None:
    found = accepted()
    assert found.result is Result.PASS
    text = html.unescape(terminal(found, "") if name == "terminal" else FORMATS[name](found))
    assert "team-a" in text
    assert "2026-05-30" in text
    assert "known" in text
    assert Acceptance.UNMATCHED in text or ending(found) in " ".join(text.split())
    assert "adapter-nonfinite" in text
    assert run_result.headline(report(PASSED, replace(PASSED, name="other"))) not in text
    back = read(FORMATS["report.json"](found).encode(), "report.json")
    assert back.adapters[0].verdict == "failed"
    assert back.accepted == 1


@pytest.mark.parametrize("name", [*FORMATS, "terminal"])
def test_past_its_day_the_run_is_red_and_every_output_says_why(name: str) -> None:
    found = accepted(today=dt.date(2027, 1, 1))
    assert found.result is Result.FAIL
    text = html.unescape(terminal(found, "") if name == "terminal" else FORMATS[name](found))
    assert Acceptance.EXPIRED in text or ending(found) in " ".join(text.split())


def test_what_is_said_of_a_baseline(wording: Wording) -> None:
    for found in (accepted(), accepted(today=dt.date(2027, 1, 1))):
        wording(*words.baseline(found))
