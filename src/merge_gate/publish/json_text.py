"""Changes values in the text of a JSON object, and leaves every other character as it is.

In: the text of a JSON object that `json` reads. Out: the text with the changes. Only objects are entered, not arrays.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from merge_gate.records.terms import record

if TYPE_CHECKING:
    from collections.abc import Callable

_BLANK = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


@record
class Member:
    """One member of an object: its place among the objects, its value, and where its text is.

    `begin` is the first character of the key, `value_begin` that of the value, and `end` follows the value. `removed`
    is the text that goes if the member goes, with one comma.
    """

    path: tuple[str, ...]
    value: Any
    begin: int
    value_begin: int
    end: int
    removed: tuple[int, int]


def members(text: str) -> list[Member]:
    """The members of all objects in the text, also of objects in objects. The members inside an object come first.

    Raises:
        ValueError: the text is not a JSON object.
        RecursionError: its objects are nested too deeply.
    """
    start = _after_blanks(text, 0)
    if text[start : start + 1] != "{":
        raise ValueError("the text is not a JSON object")
    found: list[Member] = []
    _read_object(text, start, (), found)
    return found


def replaced(text: str, chosen: Callable[[Member], bool], value: Any) -> str:
    """The text with `value` in the place of the value of each chosen member."""
    written = json.dumps(value)
    for member in sorted(members(text), key=lambda member: -member.value_begin):
        if chosen(member):
            text = text[: member.value_begin] + written + text[member.end :]
    return text


def without(text: str, chosen: Callable[[Member], bool]) -> str:
    """The text without the chosen members."""
    while True:
        kept, reached = [], 0
        for begin, end in sorted(member.removed for member in members(text) if chosen(member)):
            if begin >= reached:  # else it is inside of one that goes, or next to it: the next round has its turn
                kept.append(text[reached:begin])
                reached = end
        if not kept:
            return text
        text = "".join(kept) + text[reached:]


def _read_object(text: str, at: int, path: tuple[str, ...], found: list[Member]) -> tuple[dict[str, Any], int]:
    """The object that begins at `at`, and the index after it."""
    values: dict[str, Any] = {}
    before = at + 1  # the end of the member before this one, or of the brace
    at = _after_blanks(text, before)
    if text[at] == "}":
        return values, at + 1
    while True:
        begin = at
        key, at = _DECODER.raw_decode(text, begin)
        value_begin = _after_blanks(text, _after_blanks(text, at) + 1)
        if text[value_begin] == "{":
            value, end = _read_object(text, value_begin, (*path, key), found)
        else:
            value, end = _DECODER.raw_decode(text, value_begin)
        values[key] = value
        at = _after_blanks(text, end)
        is_last = text[at] == "}"
        following = _after_blanks(text, at + 1)
        found.append(
            Member(
                path=(*path, key),
                value=value,
                begin=begin,
                value_begin=value_begin,
                end=end,
                removed=(before if text[before - 1] != "{" else begin, end) if is_last else (begin, following),
            )
        )
        if is_last:
            return values, at + 1
        before, at = end, following


def _after_blanks(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    assert match is not None  # noqa: S101 - the pattern matches nothing as well
    return match.end()
