"""The chain from base to dtype: it breaks where the cause lies, and says nothing where nothing is known."""

from __future__ import annotations

import dataclasses

from merge_gate.records.report import Coverage
from merge_gate.records.terms import Origin, Verdict
from merge_gate.report.wording.chain import chain
from tests.support.reports import CRASHED, FAILED, HALF_FAILED, NAN, PASSED, adapter


def told(judged: object) -> list[tuple[str, str]]:
    return [(stage.outcome.value, stage.summary) for stage in chain(judged)]  # type: ignore[arg-type]


def test_a_passed_adapter_is_sound_all_the_way() -> None:
    assert told(PASSED) == [
        ("sound", "finite"),
        ("sound", "96 tensors"),
        ("sound", "48 modules"),
        ("sound", "4 tensors merged, all finite"),
    ]
    assert [stage.name for stage in chain(PASSED)] == ["base", "adapter", "merge", "bfloat16"]


def test_it_breaks_where_the_cause_lies() -> None:
    assert [outcome for outcome, _ in told(FAILED)] == ["sound", "broken", "warned", "follows"]
    assert [outcome for outcome, _ in told(HALF_FAILED)] == ["sound", "sound", "broken", "follows"]
    assert told(HALF_FAILED)[3] == ("follows", "±Inf in 1 of 36 tensors")
    base = dataclasses.replace(NAN, origin=Origin.BASE, check="base-nonfinite")
    of_base = told(adapter(verdict=Verdict.FAILED, cause=base.check, findings=(base,)))
    assert of_base[0] == ("broken", "base-nonfinite")
    assert [outcome for outcome, _ in of_base[1:]] == ["sound", "unknown", "unknown"], "no merge with it is sound"


def test_what_was_not_judged_is_not_said_to_be_sound() -> None:
    crashed = dataclasses.replace(CRASHED, coverage=Coverage())
    assert {outcome for outcome, _ in told(crashed)} == {"unknown"}
