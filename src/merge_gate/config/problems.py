"""Validates a document against the models, and reports each of pydantic's errors in plain words with its place.

The result is a model with a hole for each invalid value. Text from the file is escaped here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, TypeVar

from merge_gate._internal.text import NUMBER, quoted
from merge_gate.config.model import NEEDED, PATTERNS, Hole, Model, place_of_key
from merge_gate.config.yaml_document import Hint, Loc, NoValue, Value, YamlDocument
from merge_gate.names.suggestions import closest, nearest

_File = TypeVar("_File", bound=Model)

_MOST_MISTYPED = 20
"""How many unknown keys of a mapping are compared with the known ones."""
_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "kind": "{wanted}",
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than_equal": "at most {le:.0f}",
    "finite_number": "a finite number",
    "too_long": "at most {max_length:,} entries long",
    "string_too_long": "at most {max_length} characters long",
}
"""What the value must be, by the type of pydantic's error."""
_MISSING = {"version": "write version: 1", "adapters": "list the adapters to judge"}
_WITHOUT_QUOTES = {"int_type": NUMBER, "float_type": NUMBER, "bool_type": re.compile("true|false|yes|no|on|off")}
"""What is a value of the type if it is not quoted."""
_EMPTY = {"adapters": "list at least one adapter: a gate without adapters proves nothing"}


def read_models(document: YamlDocument, model: type[_File]) -> _File:
    """Validate the document, and report every value of the wrong type, missing key, and unknown key.

    Raises:
        ConfigError: the document is not a mapping.
    """
    if not isinstance(document.data, dict):
        if document.data is not NoValue.REFUSED:
            message = f"the file must be a mapping, got {described(document.root)}"
            document.report((), message, 'start with "version: 1"')
        document.raise_problems()
    file = model.model_validate(document.data)
    _report_all(document, file, ())
    return file


def _report_all(document: YamlDocument, value: Any, loc: Loc) -> None:
    """Report every problem in a value of the models, which is at `loc`."""
    if isinstance(value, Hole):
        for error in value.errors:
            _report(document, (*loc, *error["loc"]), error)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _report_all(document, item, (*loc, index))
    elif isinstance(value, Model):
        _report_keys(document, value, loc)
        if value.if_empty and not value.model_fields_set:
            document.report(loc, f"{label(loc)} is empty", value.if_empty)


def _report_keys(document: YamlDocument, value: Model, loc: Loc) -> None:
    names = {field.alias or name: name for name, field in type(value).model_fields.items()}
    for number, (key, extra) in enumerate((value.model_extra or {}).items()):
        document.report(loc, f"unknown {value.kind} {quoted(key)}", partial(_suggest_key, key, names), key=key)
        if meant := closest(key, names) if number < _MOST_MISTYPED else "":
            _report_all(document, getattr(type(value).model_validate({meant: extra}), names[meant]), (*loc, key))
    for key, name in names.items():
        if (inner := getattr(value, name)) is NEEDED:
            parent = f" in {label(loc)}" if loc else ""
            document.report(loc, f"{quoted(key)} is missing{parent}", _MISSING.get(key, ""))
        else:
            _report_all(document, inner, (*loc, key))


def _report(document: YamlDocument, loc: Loc, error: Mapping[str, Any]) -> None:
    """Report one of pydantic's errors."""
    place, _, value = document.deepest_at(loc)
    if loc[-1] == "[key]" and place != loc:
        name = str(loc[-2])
        document.report(loc[:-2], f"{quoted(name)} cannot be a key here", "write a name", key=name)
    elif value.data is NoValue.NULL:
        document.report(place, f"{label(place)} has no value", "give it a value, or remove it")
    elif value.data is not NoValue.REFUSED:
        document.report(place, *_wrong_value(error["type"], error.get("ctx", {}), place, value))


# --- words ---------------------------------------------------------------------------------------------------------


def _suggest_key(key: str, known: Collection[str]) -> str:
    """Name the mapping that the key belongs to, or else the closest known key, or else all known keys."""
    if place := place_of_key(key, known):
        return f"it belongs under {quoted(place)}"
    return nearest(key, known) or f"known keys: {', '.join(known)}"


def _suggest_word(word: str, known: Collection[str]) -> str:
    """Name the closest known word. float8 is close to float32 only in spelling."""
    if "float16" in known and word.lower().removeprefix("torch.").startswith(("float8", "fp8", "f8")):
        return "no adapter is merged in float8: name the dtype that the float8 weights are made from, such as bfloat16"
    return nearest(word, known)


def label(loc: Loc) -> str:
    """The last part of a place: its key, or its number in a list."""
    if isinstance(loc[-1], int):
        return f"entry {loc[-1] + 1} of {label(loc[:-1])}"
    return quoted(loc[-1])


def described(value: Value) -> str:
    """The value in words: `the number 12`, `the text "x"`, `a list of 3`."""
    data = value.data
    if isinstance(data, bool):
        return f"{value.written} (which YAML reads as {str(data).lower()})"
    if isinstance(data, int | float):
        return f"the number {quoted(value.written, mark='')}"
    if isinstance(data, str):
        return f"the text {quoted(data)}"
    if isinstance(data, list):
        return f"a list of {len(data)}" if data else "an empty list"
    return "a mapping" if isinstance(data, dict) else "nothing"


def _wrong_value(kind: str, facts: Mapping[str, Any], place: Loc, value: Value) -> tuple[str, Hint]:
    """Message and hint for one of pydantic's errors about the value at `place`."""
    name, got, data = label(place), described(value), value.data
    pattern = PATTERNS.get(facts.get("pattern", ""), "")
    if place == ("version",):
        return f"{name} must be the number 1, got {got}", "version 1 is the only version of the format"
    if kind == "literal_error":
        words = [word.strip("' ") for word in facts["expected"].replace(" or ", ", ").split(", ")]
        hint = partial(_suggest_word, data, words) if isinstance(data, str) else ""
        return f"{name} must be one of {', '.join(words)}; got {got}", hint
    if kind == "too_short":
        return f"{name} is empty", _EMPTY.get(str(place[-1]), "name at least one")
    if pattern and not data.strip():
        return f"{name} is empty", f"write {pattern}"
    expected = pattern or _EXPECTED.get(kind, "something else").format(**facts)
    return f"{name} must be {expected}, got {got}", _notation_hint(kind, data, value.written)


def _notation_hint(kind: str, value: Any, written: str) -> str:
    """The correct notation, if only quotes or a dash are wrong."""
    if kind == "string_type" and isinstance(value, int | float):
        return f'put it in quotes: "{written[:60]}"'
    pattern = _WITHOUT_QUOTES.get(kind)
    if pattern is not None and isinstance(value, str) and pattern.fullmatch(value):
        return "remove the quotes: a quoted value is text"
    if kind == "list_type" and isinstance(value, str):
        return f'put it in a list: "- {quoted(value, mark="")}"'
    return ""
