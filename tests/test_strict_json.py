"""Strict JSON: one reading, or an error that says why not."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_gate.strict_json import InvalidJsonError, parse_strictly

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(_VALUES)
def test_it_reads_what_json_writes(value: object) -> None:
    assert parse_strictly(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"\xff", "is not UTF-8 (byte 0)"),
        (b"{", "is not valid JSON"),
        (b"\xef\xbb\xbf{}", "is not valid JSON"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"a": 1, "b\\u202e": 2, "b\\u202e": 3}', "has the key 'b\\u202e' twice"),
        (b"[NaN]", "holds NaN"),
        (b"[-Infinity]", "holds -Infinity"),
        (b"9" * 10_000, "more digits"),
    ],
)
def test_everything_else_is_refused_in_printable_words(raw: bytes, says: str) -> None:
    with pytest.raises(InvalidJsonError) as caught:
        parse_strictly(raw)
    assert says in str(caught.value)
    assert str(caught.value).isprintable()
    assert caught.value.is_syntax is ("not valid JSON" in says)
