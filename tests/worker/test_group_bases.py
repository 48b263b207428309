"""One answer for each task, and the trial of expressions."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from merge_gate._internal.errors import SourceError
from merge_gate.records.files import BaseFiles, Pattern
from merge_gate.records.refusals import NotJudged, Refused
from merge_gate.records.report import Sandbox
from merge_gate.records.terms import BaseKey, Quantization
from merge_gate.worker import group_bases
from merge_gate.worker.child import judge_job
from merge_gate.worker.protocol import Event, Group, Job, Task, Unjudged
from merge_gate.worker.sandbox import SWITCH


def group(directory: str) -> Group:
    key = BaseKey(model="acme/base", revision=None, dtype="auto", quantization=Quantization.NONE)
    return Group(base=key, directory=directory, files=BaseFiles(directory=directory), tasks=())


def test_a_base_that_is_lost_answers_only_open_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent ends a worker that answers twice."""
    answer = Unjudged(task=0, refusal=NotJudged(message="m"))

    def lose_base(*_: object) -> Iterator[Event]:
        yield answer
        raise SourceError("the mount is gone")

    monkeypatch.setenv(SWITCH, "off")
    monkeypatch.setattr(group_bases, "judge_pinned", lose_base)
    lost = replace(group(str(tmp_path)), tasks=tuple(Task(index=index, files=()) for index in (0, 1)))
    events = list(judge_job(Job(groups=(lost,), device="cpu"), lambda _: None, Sandbox()))
    answers = [event for event in events if isinstance(event, Unjudged)]
    assert answers[0] == answer
    assert [event.task for event in answers] == [0, 1]


# --- regular expressions ----------------------------------------------------------------------------------------------

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")


def pattern(expression: str) -> Pattern:
    return Pattern(place="target_modules", text=expression, expression=expression)


def test_honest_expressions_pass_and_the_clock_is_put_back() -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    group_bases.try_patterns([pattern(r".*\.q_proj"), pattern("[a-z]+")], NAMES)
    group_bases.try_patterns([], NAMES)
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGVTALRM) is before


@pytest.mark.parametrize("expression", ["(", "[a", "(?P<x>.)(?P<x>.)", "a{99999999999}", "(" * 5000 + ")" * 5000])
def test_what_is_no_expression_is_refused_by_its_name(expression: str) -> None:
    with pytest.raises(Refused) as raised:
        group_bases.try_patterns([pattern("q_proj"), pattern(expression)], NAMES)
    refusal = raised.value.refusal
    assert refusal.kind == "pattern_refused"
    assert refusal.fields["pattern"] == pattern(expression)
    assert refusal.fields["problem"]


def test_one_without_end_is_refused_after_its_computing_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_bases, "TRIAL_TIMEOUT_S", 0.2)
    with pytest.raises(Refused) as raised:
        group_bases.try_patterns([pattern("q_proj"), pattern("(([a-z0-9_.])+)+!")], NAMES)
    endless = Refused("pattern_refused", pattern=pattern("(([a-z0-9_.])+)+!"), names=2, seconds=0.2)
    assert raised.value.refusal == endless.refusal
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
