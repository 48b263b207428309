"""A document + the models → what is wrong with it, in plain words and with its place.

In: plain data with places. Out: a `Problem` for each thing that types can say is wrong, and the parts that are right.
Knows pydantic's errors, and neither files nor what the configuration means; text from outside is escaped here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from merge_gate.config.model import PATTERNS, FileEntry, Model, keys_at
from merge_gate.config.nearest import nearest
from merge_gate.config.positions import Document, Loc, Plain
from merge_gate.errors import ConfigError
from merge_gate.records.config import Problem
from merge_gate.text import quoted

Entry = TypeVar("Entry", bound=Model)

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
    "model_attributes_type": "a mapping",
}
_BOUNDS = {
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than_equal": "at most {le:.0f}",
    "finite_number": "a finite number",
    "too_long": "at most {max_length} entries long",
    "string_too_long": "at most {max_length} characters long",
}


class Problems:
    """All that is wrong with a document, and where; the stages add to it."""

    def __init__(self, document: Document) -> None:
        self.document, self.found = document, list(document.problems)
        self.wrong: set[Loc] = set()
        if not isinstance(document.data, dict):
            if document.root not in document.broken:
                got = described(document.data, document.root)
                self.report((), f"the file must be a mapping, got {got}", 'start with "version: 1"')
            self.raise_any()
        self._validate()

    def raise_any(self) -> None:
        """Raise a `ConfigError` if there are problems."""
        if self.found:
            unique = dict.fromkeys(sorted(self.found, key=lambda problem: (problem.line, problem.column)))
            raise ConfigError(tuple(unique)) from None

    def report(self, loc: Loc, message: str, hint: str = "", *, key: str | None = None) -> None:
        """Add a problem at the value at `loc`, or at the key `key` of the mapping there."""
        line, column = self.document.line(loc, key)
        self.found.append(Problem(message=message, hint=hint, path=self.document.path, line=line, column=column))

    def report_unknown(self, loc: Loc, key: str, known: Iterable[str], kind: str) -> None:
        """Add a problem for a key that does not exist, with the nearest one that does."""
        names = list(known)
        hint = nearest(key, names) or f"known here: {', '.join(names)}"
        self.report(loc, f"unknown {kind} {quoted(key)}", hint, key=key)

    def is_there(self, loc: Loc) -> bool:
        """Whether something stands at `loc`, right or wrong."""
        return self.document.locate(loc)[1] == loc

    def part(self, model: type[Entry], loc: Loc) -> Entry | None:
        """The model at `loc` without the keys that are wrong; None where there is nothing to go on with."""
        data = model.long(self.document.get(loc)) if self.is_there(loc) else None
        if not isinstance(data, dict) or (loc in self.wrong and not isinstance(self.document.get(loc), dict)):
            return None
        return model.part({key: item for key, item in data.items() if (*loc, key) not in self.wrong})

    def _validate(self) -> None:
        try:
            FileEntry.model_validate(self.document.data)
        except ValidationError as refused:
            errors = refused.errors(include_url=False, include_input=False)
        else:
            errors = []
        for error in errors:
            loc = error["loc"]
            self.wrong |= {loc[:depth] for depth in range(1, len(loc) + 1)}
            self._translate(error)
        self._report_nulls({error["loc"] for error in errors if error["type"] == "extra_forbidden"})

    def _translate(self, error: Mapping[str, Any]) -> None:
        loc: Loc = error["loc"]
        if error["type"] == "extra_forbidden":
            self.report_unknown(loc[:-1], str(loc[-1]), keys_at(loc[:-1]), "key")
        elif error["type"] == "missing":
            place = self.document.locate(loc[:-1])[1]
            if isinstance(self.document.get(place), dict):
                where = f" in {label(place)}" if place else ""
                self.report(place, f"{quoted(str(loc[-1]))} is missing{where}", _MISSING.get(str(loc[-1]), ""))
        elif loc[-1:] == ("[key]",):
            self.report(loc[:-2], f"{quoted(str(loc[-2]))} cannot be a key here", "write a name", key=str(loc[-2]))
        else:
            node, place = self.document.locate(loc)
            value = self.document.get(place)
            if value is not None:  # an absent value and a broken one have problems of their own
                self.report(place, *_wrong_value(error, value, node, place))

    def _report_nulls(self, unknown: set[Loc]) -> None:
        for loc, node, value in self.document.walk():
            is_hidden = any(loc[:depth] in unknown for depth in range(1, len(loc) + 1))
            if value is None and node not in self.document.broken and not is_hidden:
                self.report(loc, f"{label(loc)} has no value", "give it one, or remove it")


# --- words ---------------------------------------------------------------------------------------------------------


def label(loc: Loc) -> str:
    """A place by its key, or by its number in a list."""
    if not loc:
        return "the file"
    if isinstance(loc[-1], int):
        return f"entry {loc[-1] + 1} of {label(loc[:-1])}"
    return quoted(loc[-1])


def described(value: Plain, node: yaml.Node) -> str:
    """What stands in the file: `the number 12`, `the text "x"`, `a list`."""
    if isinstance(value, bool):
        return f"{node.value} (which YAML reads as {str(value).lower()})"
    if isinstance(value, int | float):
        return f"the number {quoted(node.value, mark='')}"
    if isinstance(value, str):
        return f"the text {quoted(value)}"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    return "a mapping" if isinstance(value, dict) else "nothing"


def _wrong_value(error: Mapping[str, Any], value: Plain, node: yaml.Node, loc: Loc) -> tuple[str, str]:
    """Message and hint for what pydantic found wrong with `value`, which stands at `loc`."""
    kind, facts = error["type"], error.get("ctx") or {}
    got = described(value, node)
    if loc == ("version",):
        return f"{label(loc)} must be the number 1, got {got}", "this is the only version of the format"
    if kind in _KINDS:
        return f"{label(loc)} must be {_expected_kind(kind, loc)}, got {got}", _hint_for_kind(kind, value, node)
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


def _expected_kind(kind: str, loc: Loc) -> str:
    if kind.startswith("model") and (loc[-1:] == ("base",) or loc[:-1] == ("adapters",)):
        return "text (a directory or a Hub id) or a mapping"
    if kind.startswith("model") and loc[-2:-1] == ("checks",):
        return "error, warning or off, or a mapping with severity and limit"
    return "a dtype or a list of dtypes" if loc[-1:] == ("dtype",) else _KINDS[kind]


def _hint_for_kind(kind: str, value: Plain, node: yaml.Node) -> str:
    """How to write it when only the quotes or a dash are wrong."""
    if kind == "string_type" and isinstance(value, int | float):
        return f'put it in quotes: "{node.value[:60]}"'
    if kind in {"int_type", "float_type", "bool_type"} and isinstance(value, str):
        return "YAML reads what stands in quotes as text: write it without quotes"
    return f'put it in a list: "- {quoted(value, mark="")}"' if kind == "list_type" and isinstance(value, str) else ""
