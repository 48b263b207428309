"""Validates a document against the models, and reports each of pydantic's errors in plain words with its place.

Text from the file is escaped here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial, reduce
from operator import getitem
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from merge_gate._internal.text import SIZE, one_of, quoted
from merge_gate.config.model import DATE, HEX_64, PEFT_TYPE, TEXT, VALID_PARTS, Model
from merge_gate.config.yaml_document import KEY, Hint, Loc, NoValue, YamlDocument, described
from merge_gate.names.suggestions import nearest
from merge_gate.records.features import declared

_File = TypeVar("_File", bound=Model)

_EXPECTED = {
    "string_type": "be text",
    "bool_type": "be true or false",
    "dict_type": "be a mapping",
    "model_type": "be a mapping",
    TEXT: "be some text",
    HEX_64: "be 64 hexadecimal digits, as sha256sum prints them",
    DATE: "be a date such as 2026-12-31",
    PEFT_TYPE: "be a PEFT type such as LORA",
    SIZE: "be a size such as 5GB or 500MiB",
}
"""What a value must be, by the type of pydantic's error or by the pattern, if pydantic's own words are less clear."""
_HINTS = {
    "": "start with version: 1",
    "version": "write version: 1",
    "adapters": "list the adapters to judge",
    "string_type": "put it in quotes",
    "int_type": "a value in quotes is text",
    "float_type": "a value in quotes is text",
    "bool_type": "a value in quotes is text",
    "list_type": 'write "- " before each entry',
    "too_short": "list at least one",
    "empty": "give it a key, or remove it",
    "'error' or 'on'": "this check cannot be switched off or lowered",
    "1.0": "write a share, such as 0.5",
}
"""What to do next, by the words or the limit that are expected, the type of pydantic's error, or the place."""
_MOST_PLACES = 3


def read_models(document: YamlDocument, model: type[_File]) -> _File:
    """Validate the document, and report every value of the wrong type, missing key, and unknown key.

    Returns:
        the model. If there are problems, it has only the valid parts, so that these can still be checked.

    Raises:
        ConfigError: the document is not a mapping.
    """
    try:
        return model.model_validate(document.data)
    except ValidationError as error:
        for row in error.errors(include_url=False):
            _report(document, model, row)
    if not isinstance(document.data, dict):
        document.raise_problems()
    return model.model_validate(document.data, context=VALID_PARTS)


def _report(document: YamlDocument, model: type[Model], row: Mapping[str, Any]) -> None:
    """Report one of pydantic's errors. Remove an unknown key from the data, and give a missing one a refused value."""
    loc, kind, facts = row["loc"], row["type"], row.get("ctx", {})
    place, node = document.find(loc)
    mapping = reduce(getitem, loc[:-1], document.data) if kind in {"extra_forbidden", "missing"} else {}
    if kind == "extra_forbidden":
        mapping.pop(loc[-1], None)
        document.has_unknown_keys.add(loc[:-1])
        document.report((*loc, KEY), *_unknown(model, loc))
    elif kind == "missing":
        mapping[loc[-1]] = NoValue.REFUSED
        parent = f" in {_label(place)}" if place else ""
        document.report(loc, f"{quoted(loc[-1])} is missing{parent}", _HINTS.get(".".join(map(str, loc)), "add it"))
    elif row["input"] is NoValue.NULL:
        document.report(loc, f"{_label(place)} has no value", "give it a value, or remove it")
    elif row["input"] is not NoValue.REFUSED:
        words = facts.get("expected", "")
        plain = row["msg"].partition(" should ")[2].partition(" after ")[0]
        expected = _EXPECTED.get(facts.get("pattern", kind), plain)
        keys = (words or str(facts.get("le")), ".".join(map(str, place)), kind)
        hint: Hint = next((_HINTS[key] for key in keys if key in _HINTS), "")
        if isinstance(row["input"], str) and words and not hint:
            hint = partial(nearest, row["input"], re.findall("'([^']+)'", words))
        document.report(loc, f"{_label(place)} must {expected}, got {described(node)}", hint)


def _unknown(model: type[Model], loc: Loc) -> tuple[str, Hint]:
    """The message and the hint about a key that is unknown, or that earlier versions knew."""
    key = str(loc[-1])
    gone = next((keys[key] for keys in declared("GONE_KEYS") if key in keys), None)
    if gone is not None:
        return f"{quoted(key)} is gone", gone
    return f"unknown key {quoted(key)}", partial(_suggest_key, model, loc)


def _suggest_key(model: type[Model], loc: Loc) -> str:
    """Name the mapping that the key belongs to, or else the closest known key, or else all known keys."""
    for part in loc[:-1]:
        if isinstance(part, str):
            model = next(_models(_fields(model)[part].annotation))
    known, key = _fields(model), str(loc[-1])
    places = [outer for outer, field in known.items() for inner in _models(field.annotation) if key in _fields(inner)]
    if 0 < len(places) <= _MOST_PLACES:
        return f"it belongs under {one_of(map(quoted, places))}"
    return nearest(key, known) or f"known keys: {', '.join(known)}"


def _fields(model: type[Model]) -> dict[str, FieldInfo]:
    """The fields of a model, by their keys."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _models(annotation: Any) -> Iterator[type[Model]]:
    """The models that a type names."""
    if isinstance(annotation, type(Model)):
        yield annotation
    for inner in get_args(getattr(annotation, "__value__", annotation)):
        yield from _models(inner)


def _label(loc: Loc) -> str:
    """The last part of a place: its key, or its number in a list."""
    if not loc:
        return "the file"
    return f"entry {loc[-1] + 1} of {_label(loc[:-1])}" if isinstance(loc[-1], int) else quoted(loc[-1])
