"""One answer for each task, the trial of expressions, and which groups of a job the worker judges together."""

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
from merge_gate.worker.child import is_same_base, judge_job, rounds
from merge_gate.worker.merging import judge_groups, pattern_trial
from merge_gate.worker.protocol import Event, Group, Job, Task, Unjudged
from merge_gate.worker.sandbox import SWITCH


def group(directory: str) -> Group:
    key = BaseKey(model="acme/base", revision=None, dtype="auto", quantization=Quantization.NONE)
    return Group(base=key, directory=directory, files=BaseFiles(directory=directory), tasks=())


def test_a_base_that_is_lost_answers_only_open_tasks(
    tmp_path: Path, variables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent ends a worker that answers twice."""
    answer = Unjudged(task=0, refusal=NotJudged(message="m"))

    def lose_base(*_: object) -> Iterator[Event]:
        yield answer
        raise SourceError("the mount is gone")

    variables[SWITCH] = "off"
    monkeypatch.setattr(judge_groups, "judge_pinned", lose_base)
    lost = replace(group(str(tmp_path)), tasks=tuple(Task(index=index, files=()) for index in (0, 1)))
    events = list(judge_job(Job(groups=(lost,), device="cpu"), lambda _: None, Sandbox()))
    answers = [event for event in events if isinstance(event, Unjudged)]
    assert answers[0] == answer
    assert [event.task for event in answers] == [0, 1]


NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")


def pattern(expression: str) -> Pattern:
    return Pattern(place="target_modules", text=expression, expression=expression)


def test_honest_expressions_pass_and_the_clock_is_put_back() -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    pattern_trial.try_patterns([pattern(r".*\.q_proj"), pattern("[a-z]+")], NAMES)
    pattern_trial.try_patterns([], NAMES)
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGVTALRM) is before


@pytest.mark.parametrize("expression", ["(", "[a", "(?P<x>.)(?P<x>.)", "a{99999999999}", "(" * 5000 + ")" * 5000])
def test_what_is_no_expression_is_refused_by_its_name(expression: str) -> None:
    with pytest.raises(Refused) as raised:
        pattern_trial.try_patterns([pattern("q_proj"), pattern(expression)], NAMES)
    refusal = raised.value.refusal
    assert refusal.kind == "pattern_refused"
    assert refusal.fields["pattern"] == pattern(expression)
    assert refusal.fields["problem"]


def test_one_without_end_is_refused_after_its_computing_time() -> None:
    with pytest.raises(Refused) as raised:
        pattern_trial.try_patterns([pattern("q_proj"), pattern("(([a-z0-9_.])+)+!")], NAMES, timeout_s=0.2)
    endless = Refused("pattern_refused", pattern=pattern("(([a-z0-9_.])+)+!"), names=2, seconds=0.2)
    assert raised.value.refusal == endless.refusal
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def one_group(directory: str, dtype: str, task: int, *, one_pass: bool = True, quantization: str = "none") -> Group:
    key = BaseKey(model=directory, revision=None, dtype=dtype, quantization=quantization)
    return Group(
        base=key,
        directory=directory,
        files=BaseFiles(directory=directory),
        tasks=(Task(index=task, files=()),),
        one_pass=one_pass,
    )


def test_dtypes_of_a_base_that_is_read_in_a_pass_come_together() -> None:
    groups = [
        one_group("a", "bfloat16", 0),
        one_group("b", "bfloat16", 1),
        one_group("a", "float32", 2),
        one_group("a", "bfloat16", 3, quantization="bnb-4bit"),
        replace(one_group("a", "float16", 4), tasks=()),
        one_group("b", "float16", 5),
    ]
    assert list(rounds(groups)) == [[0, 2], [1, 5], [3]]


def test_a_base_that_fits_in_memory_comes_one_dtype_at_a_time() -> None:
    groups = [one_group("a", dtype, index, one_pass=False) for index, dtype in enumerate(("bfloat16", "float32"))]
    assert list(rounds(groups)) == [[0], [1]]
    assert list(rounds([])) == []
    assert is_same_base(groups[0], groups[1])


def test_groups_whose_bases_are_read_in_another_way_are_apart() -> None:
    first, second = one_group("a", "bfloat16", 0), one_group("a", "float32", 1)
    assert list(rounds([first, replace(second, fed=True)])) == [[0], [1]]
    on_network = [replace(one, one_pass=False, fed=True) for one in (first, second)]
    assert list(rounds(on_network)) == [[0, 1]]
