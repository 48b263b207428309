"""Edits of JSON text: the value changes, and every other character stays."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_gate.publish.json_text import members, replaced, without

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@given(
    content=st.dictionaries(st.sampled_from(["a", "b", "c", "{", '"']), _VALUES, max_size=5),
    indent=st.sampled_from([None, 0, 2]),
    key=st.sampled_from(["a", "b", "c", "{", '"']),
)
def test_a_member_is_replaced_or_removed_wherever_it_is(content: dict[str, Any], indent: int | None, key: str) -> None:
    text = json.dumps(content, indent=indent)
    assert json.loads(without(text, lambda member: member.path[-1] == key)) == _without(content, key)
    changed = replaced(text, lambda member: member.path == (key,), 7)
    assert json.loads(changed) == (content | {key: 7} if key in content else content)


def _without(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {name: _without(inner, key) for name, inner in value.items() if name != key}
    return value


def test_every_other_character_stays() -> None:
    text = '{ "x":1e3 ,\n\t"vocab_size" : 32 , "y": [ {"vocab_size":32} ], "t": {"vocab_size":32} }\n'
    assert replaced(text, lambda member: member.path[-1] == "vocab_size", 40) == (
        '{ "x":1e3 ,\n\t"vocab_size" : 40 , "y": [ {"vocab_size":32} ], "t": {"vocab_size":40} }\n'
    )
    assert without(text, lambda member: member.path[0] in {"vocab_size", "t"}) == (
        '{ "x":1e3 ,\n\t"y": [ {"vocab_size":32} ] }\n'
    )


def test_several_members_of_one_object_are_removed() -> None:
    text = '{"a":1,"a":{"a":0},"b":3,"a":4,"a":5,"\\u0061":6}'
    assert without(text, lambda member: member.path[-1] == "a") == '{"b":3}'
    assert without(text, lambda member: member.path[0] in {"a", "b"}) == "{}"


@pytest.mark.parametrize("text", ["", "[]", "3", '{"a"', '{"a": 1'])
def test_text_that_is_no_object_is_refused(text: str) -> None:
    with pytest.raises((ValueError, IndexError)):
        members(text)
