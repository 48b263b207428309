"""Foreign text: what is hidden is shown, what could be a command is not one."""

from __future__ import annotations

import pytest
from hypothesis import given

from merge_gate.report.wording.untrusted import inert, one_line, safe_text, shorten
from tests.support.reports import TEXTS, runner_obeys


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("Größe 名前", "Größe 名前"),
        ("a\nb\tc  d", "a b c d"),
        ("a\u2028b", "a b"),
        ("\x1b[31mred", "\ufffd[31mred"),
        ("\u202efdp.exe", "\ufffdfdp.exe"),
        ("zero\u200bwidth\ufeff", "zero\ufffdwidth\ufffd"),
        ("\ud800", "\ufffd"),
        ("e" + "\u0301" * 50, "e" + "\u0301" * 4),
        ("\u3164", "\ufffd"),
    ],
)
def test_hidden_characters_are_shown_on_one_line(text: str, shown: str) -> None:
    assert one_line(text) == shown


def test_a_long_name_keeps_head_and_tail() -> None:
    assert shorten("model.layers.31.mlp.up_proj", 13) == "model.…p_proj"
    assert len(one_line("x" * 999, 200)) == 200


def test_commands_are_broken_and_stay_readable() -> None:
    assert inert("  ::error::x") == "  : :error::x"
    assert inert("log ##[error]x") == "log # #[error]x"
    assert inert("a::b #[x]") == "a::b #[x]"
    assert safe_text("one\r::error::two\nthree") == "one\n: :error::two\nthree"


@given(TEXTS)
def test_no_line_of_any_text_is_obeyed(text: str) -> None:
    assert not any(runner_obeys(line) for line in safe_text(text).split("\n"))
    assert not runner_obeys(inert(one_line(text)))
    assert one_line(text).isprintable()
