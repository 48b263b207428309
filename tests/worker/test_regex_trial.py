"""Regular expressions of an adapter, tried on a base's names before PEFT matches them."""

from __future__ import annotations

import signal

import pytest

from merge_gate.records.files import Pattern
from merge_gate.records.refusals import Refused
from merge_gate.worker import regex_trial
from merge_gate.worker.regex_trial import try_patterns

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")


def pattern(expression: str) -> Pattern:
    return Pattern(place="target_modules", text=expression, expression=expression)


def test_honest_expressions_pass_and_the_clock_is_put_back() -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    try_patterns([pattern(r".*\.q_proj"), pattern("[a-z]+")], NAMES)
    try_patterns([], NAMES)
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGVTALRM) is before


@pytest.mark.parametrize("expression", ["(", "[a", "(?P<x>.)(?P<x>.)", "a{99999999999}", "(" * 5000 + ")" * 5000])
def test_what_is_no_expression_is_refused_by_its_name(expression: str) -> None:
    with pytest.raises(Refused) as raised:
        try_patterns([pattern("q_proj"), pattern(expression)], NAMES)
    refusal = raised.value.refusal
    assert refusal.kind == "pattern_refused"
    assert refusal.fields["pattern"] == pattern(expression)
    assert refusal.fields["problem"]


def test_one_without_end_is_refused_after_its_computing_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regex_trial, "TRIAL_LIMIT_S", 0.2)
    with pytest.raises(Refused) as raised:
        try_patterns([pattern("q_proj"), pattern("(([a-z0-9_.])+)+!")], NAMES)
    endless = Refused("pattern_refused", pattern=pattern("(([a-z0-9_.])+)+!"), names=2, seconds=0.2)
    assert raised.value.refusal == endless.refusal
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
