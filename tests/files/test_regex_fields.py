"""What PEFT reads as regular expressions: found wherever it may stand, judged without matching anything."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest

from merge_gate.files.regex_fields import MAX_CHARACTERS, patterns_of, problem
from merge_gate.records.files import Pattern


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"target_modules": ".*q|v"}, [("target_modules", ".*q|v", ".*q|v")]),
        ({"exclude_modules": "(a)"}, [("exclude_modules", "(a)", "(a)")]),
        ({"feedforward_modules": "a*"}, [("feedforward_modules", "a*", "a*")]),
        ({"target_modules": [".*q"]}, []),  # in a list they are plain names
        ({"modules_to_save": ".*q"}, []),
        ({"layers_pattern": "h+"}, [("layers_pattern", "h+", r"(?:^|.*?\.)h+\.(?P<idx>\d+)\.")]),
        ({"layers_pattern": ["h", 3, "b*"]}, [("layers_pattern", "b*", r"(?:^|.*?\.)b*\.(?P<idx>\d+)\.")]),
        ({"layers_pattern": 7}, []),
        ({"rank_pattern": {"^a.*": 4, "q": 8}}, [("a key of rank_pattern", "^a.*", r"(.*\.)?(^a.*)$")]),
        ({"alpha_pattern": {"a|b": 4}}, [("a key of alpha_pattern", "a|b", r"(.*\.)?(a|b)$")]),
        ({"alpha_pattern": ["a|b"]}, []),
        ({"target_modules": "model.layers_1.q-proj"}, []),  # a name, and a valid expression that ends at once
        ({"rank_pattern": {r"^model\.q$": 1}}, []),
        ({"rank_pattern": {"a+": 1}, "target_modules": "b+"}, ["a+", "b+"]),
    ],
)
def test_expressions_are_found_where_peft_reads_them(config: dict[str, Any], found: list[Any]) -> None:
    got = list(patterns_of(config))
    if found and isinstance(found[0], str):
        assert [pattern.text for pattern in got] == found
    else:
        assert [(pattern.place, pattern.text, pattern.expression) for pattern in got] == found


def pattern(text: str) -> Pattern:
    return Pattern(place="target_modules", text=text, expression=text)


@pytest.mark.parametrize("text", ["a", "(a+)+", "[[a]", "a" * MAX_CHARACTERS])
def test_a_valid_expression_is_no_problem_and_no_warning(text: str) -> None:
    """`[[` warns of sets to come, which is nobody's concern here."""
    re.purge()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert problem(pattern(text)) is None
    assert not seen


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("(", "missing ), unterminated subpattern at position 0"),
        ("a{99999999999}", "the repetition number is too large"),
        ("a" * (MAX_CHARACTERS + 1), "it has 100,001 characters, expected at most 100,000"),
    ],
)
def test_an_expression_that_is_not_taken_says_why(text: str, why: str) -> None:
    assert problem(pattern(text)) == why


def test_nesting_without_end_is_a_problem_and_no_crash() -> None:
    assert problem(pattern("(" * 20_000 + ")" * 20_000))
