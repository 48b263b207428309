"""A document + the models → the models with holes, and what is wrong with them in plain words and with its place.

In: plain data with places. Out: a model of what types can say is right, a `Problem` for all the rest. Knows
pydantic's errors, and neither files nor what the configuration means; text from outside is escaped here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, TypeVar

from merge_gate.config.model import PATTERNS, Model, place_of_key, wrong
from merge_gate.config.suggestions import nearest
from merge_gate.config.yaml_document import Hint, Loc, Nothing, Value, YamlDocument
from merge_gate.text import quoted

_File = TypeVar("_File", bound=Model)

_WANTED = {
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
"""What must stand there, by the type of pydantic's error."""
_MISSING = {"version": "write version: 1", "adapters": "list the adapters to judge"}
_EMPTY = {"adapters": "a gate that checks nothing proves nothing: list at least one adapter"}


def read_models(document: YamlDocument, model: type[_File]) -> _File:
    """Validate the document, and report all that types can say is wrong with it.

    Raises:
        ConfigError: it is not even a mapping.
    """
    if not isinstance(document.data, dict):
        if document.data is not Nothing.REFUSED:
            message = f"the file must be a mapping, got {described(document.root)}"
            document.report((), message, 'start with "version: 1"')
        document.raise_problems()
    file = model.model_validate(document.data)
    for loc, error in wrong(file):
        _report(document, loc, error)
    return file


def _report(document: YamlDocument, loc: Loc, error: Mapping[str, Any]) -> None:
    place, _, there = document.at(loc)
    key = str(loc[-1]) if loc else ""
    match error["type"], there.data:
        case "unknown", _:
            known = error["known"]
            said = f"unknown {error['kind']} {quoted(key)}"
            document.report(loc[:-1], said, partial(_meant, key, known), key=key)
        case "empty", _:
            document.report(loc, f"{label(loc)} is empty", error["hint"])
        case "missing", _:
            where = f" in {label(loc[:-1])}" if loc[:-1] else ""
            document.report(loc[:-1], f"{quoted(key)} is missing{where}", _MISSING.get(key, ""))
        case _ if key == "[key]" and place != loc:
            name = str(loc[-2])
            document.report(loc[:-2], f"{quoted(name)} cannot be a key here", "write a name", key=name)
        case _, Nothing.NULL:
            document.report(place, f"{label(place)} has no value", "give it one, or remove it")
        case kind, data if data is not Nothing.REFUSED:
            document.report(place, *_wrong_value(kind, error.get("ctx", {}), place, there))


# --- words ---------------------------------------------------------------------------------------------------------


def _meant(key: str, known: Collection[str]) -> str:
    """Where the key belongs, else the one that was perhaps meant, else all of them."""
    if place := place_of_key(key, known):
        return f"it belongs under {quoted(place)}"
    return nearest(key, known) or f"known here: {', '.join(known)}"


def label(loc: Loc) -> str:
    """A place by its key, or by its number in a list."""
    if isinstance(loc[-1], int):
        return f"entry {loc[-1] + 1} of {label(loc[:-1])}"
    return quoted(loc[-1])


def described(there: Value) -> str:
    """What stands in the file: `the number 12`, `the text "x"`, `a list`."""
    value = there.data
    if isinstance(value, bool):
        return f"{there.written} (which YAML reads as {str(value).lower()})"
    if isinstance(value, int | float):
        return f"the number {quoted(there.written, mark='')}"
    if isinstance(value, str):
        return f"the text {quoted(value)}"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    return "a mapping" if isinstance(value, dict) else "nothing"


def _wrong_value(kind: str, facts: Mapping[str, Any], place: Loc, there: Value) -> tuple[str, Hint]:
    """Message and hint for what pydantic found wrong with the value at `place`."""
    name, got, value = label(place), described(there), there.data
    pattern = PATTERNS.get(facts.get("pattern", ""), "")
    if place == ("version",):
        return f"{name} must be the number 1, got {got}", "this is the only version of the format"
    if kind == "literal_error":
        words = [word.strip("' ") for word in facts["expected"].replace(" or ", ", ").split(", ")]
        hint = partial(nearest, value, words) if isinstance(value, str) else ""
        return f"{name} must be one of {', '.join(words)}; got {got}", hint
    if kind == "too_short":
        return f"{name} is empty", _EMPTY.get(str(place[-1]), "name at least one")
    if pattern and not value.strip():
        return f"{name} is empty", f"write {pattern}"
    wanted = pattern or _WANTED.get(kind, "something else").format(**facts)
    return f"{name} must be {wanted}, got {got}", _rewritten(kind, value, there.written)


def _rewritten(kind: str, value: Any, written: str) -> str:
    """How to write it when only the quotes or a dash are wrong."""
    if kind == "string_type" and isinstance(value, int | float):
        return f'put it in quotes: "{written[:60]}"'
    if kind in {"int_type", "float_type", "bool_type"} and isinstance(value, str):
        return "YAML reads what stands in quotes as text: write it without quotes"
    if kind == "list_type" and isinstance(value, str):
        return f'put it in a list: "- {quoted(value, mark="")}"'
    return ""
