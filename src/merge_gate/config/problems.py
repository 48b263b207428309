"""A document + the models → the models with holes, and what is wrong with them in plain words and with its place.

In: plain data with places. Out: a model of what types can say is right, a `Problem` for all the rest. Knows
pydantic's errors, and neither files nor what the configuration means; text from outside is escaped here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from merge_gate.config.model import PATTERNS, Model, wrong
from merge_gate.config.nearest import nearest
from merge_gate.config.positions import Document, Loc, Place
from merge_gate.text import quoted

_File = TypeVar("_File", bound=Model)

_MISSING = {"version": "write version: 1", "adapters": "list the adapters to judge"}
_EMPTY = {"adapters": "a gate that checks nothing proves nothing: list at least one adapter"}
_KINDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}
_BOUNDS = {
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than_equal": "at most {le:.0f}",
    "finite_number": "a finite number",
    "too_long": "at most {max_length} entries long",
    "string_too_long": "at most {max_length} characters long",
}


def read_models(document: Document, model: type[_File]) -> _File:
    """Validate the document, and report all that types can say is wrong with it.

    Raises:
        ConfigError: it is not even a mapping.
    """
    whole = document.at(())
    if not isinstance(whole.data, dict):
        if not whole.is_broken:
            document.report((), f"the file must be a mapping, got {described(whole)}", 'start with "version: 1"')
        document.raise_problems()
    file = model.model_validate(whole.data)
    for loc, error in wrong(file):
        _report(document, loc, error)
    return file


def _report(document: Document, loc: Loc, error: Mapping[str, Any]) -> None:
    key = str(loc[-1]) if loc else ""
    if error["type"] == "unknown":
        hint = nearest(key, error["known"]) or f"known here: {', '.join(error['known'])}"
        document.report(loc[:-1], f"unknown {error['kind']} {quoted(key)}", hint, key=key)
    elif error["type"] == "missing":
        where = f" in {label(loc[:-1])}" if loc[:-1] else ""
        document.report(loc[:-1], f"{quoted(key)} is missing{where}", _MISSING.get(key, ""))
    elif error["type"] == "empty":
        document.report(loc, f"{label(loc)} is empty", error["hint"])
    elif key == "[key]":
        document.report(loc[:-2], f"{quoted(str(loc[-2]))} cannot be a key here", "write a name", key=str(loc[-2]))
    else:
        place, there = document.locate(loc), document.at(loc)
        if there.data is not None:
            document.report(place, *_wrong_value(error, there, place))
        elif not there.is_broken:  # what is broken has a problem of its own
            document.report(place, f"{label(place)} has no value", "give it one, or remove it")


# --- words ---------------------------------------------------------------------------------------------------------


def label(loc: Loc) -> str:
    """A place by its key, or by its number in a list."""
    if not loc:
        return "the file"
    if isinstance(loc[-1], int):
        return f"entry {loc[-1] + 1} of {label(loc[:-1])}"
    return quoted(loc[-1])


def described(place: Place) -> str:
    """What stands in the file: `the number 12`, `the text "x"`, `a list`."""
    value = place.data
    if isinstance(value, bool):
        return f"{place.node.value} (which YAML reads as {str(value).lower()})"
    if isinstance(value, int | float):
        return f"the number {quoted(place.node.value, mark='')}"
    if isinstance(value, str):
        return f"the text {quoted(value)}"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    return "a mapping" if isinstance(value, dict) else "nothing"


def _wrong_value(error: Mapping[str, Any], there: Place, loc: Loc) -> tuple[str, str]:
    """Message and hint for what pydantic found wrong with the value at `loc`."""
    kind, facts, value = error["type"], error.get("ctx") or {}, there.data
    got = described(there)
    if loc == ("version",):
        return f"{label(loc)} must be the number 1, got {got}", "this is the only version of the format"
    if kind == "kind" or kind in _KINDS:
        return f"{label(loc)} must be {facts.get('wanted') or _KINDS[kind]}, got {got}", _rewritten(kind, there)
    if kind == "literal_error":
        words = [word.strip("' ") for word in facts["expected"].replace(" or ", ", ").split(", ")]
        hint = nearest(value, words) if isinstance(value, str) else ""
        return f"{label(loc)} must be one of {', '.join(words)}; got {got}", hint
    if kind == "too_short":
        return f"{label(loc)} is empty", _EMPTY.get(str(loc[-1]), "name at least one")
    if kind == "string_pattern_mismatch" and isinstance(value, str) and not value.strip():
        return f"{label(loc)} is empty", f"write {PATTERNS[facts['pattern']]}"
    wanted = PATTERNS.get(facts.get("pattern", ""), _BOUNDS.get(kind, "something else").format(**facts))
    return f"{label(loc)} must be {wanted}, got {got}", ""


def _rewritten(kind: str, there: Place) -> str:
    """How to write it when only the quotes or a dash are wrong."""
    if kind == "string_type" and isinstance(there.data, int | float):
        return f'put it in quotes: "{there.node.value[:60]}"'
    if kind in {"int_type", "float_type", "bool_type"} and isinstance(there.data, str):
        return "YAML reads what stands in quotes as text: write it without quotes"
    if kind == "list_type" and isinstance(there.data, str):
        return f'put it in a list: "- {quoted(there.data, mark="")}"'
    return ""
