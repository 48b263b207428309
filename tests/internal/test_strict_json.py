"""Strict JSON: one reading, or an error that says why not."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_gate._internal.strict_json import InvalidJsonError, parse_strictly
from tests.support.wording import Wording

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(_VALUES)
def test_it_reads_what_json_writes(value: object) -> None:
    assert parse_strictly(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("raw", "is_syntax"),
    [
        pytest.param(b"\xff", False, id="not UTF-8"),
        pytest.param(b"{", True, id="cut off"),
        pytest.param(b"\xef\xbb\xbf{}", True, id="byte order mark"),
        pytest.param(b"[" * 100_000, False, id="nested"),
        pytest.param(b'{"a": 1, "b\\u202e": 2, "b\\u202e": 3}', False, id="twice"),
        pytest.param(b"[NaN]", False, id="NaN"),
        pytest.param(b"[-Infinity]", False, id="-Infinity"),
        pytest.param(b"9" * 10_000, False, id="digits"),
    ],
)
def test_everything_else_is_refused_in_printable_words(raw: bytes, is_syntax: bool, wording: Wording) -> None:
    with wording.of(InvalidJsonError) as caught:
        parse_strictly(raw)
    assert str(caught.value).isprintable()
    assert caught.value.is_syntax is is_syntax
