"""Values with places + models → problems in plain words, and the parts that can be used.

In: the tree of values. Out: a `Problem` for each thing that types can say is wrong, and models of what is right. Knows
pydantic's errors, and neither files nor what the configuration means.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from merge_gate.config.model import AdapterEntry, BaseEntry, CheckEntry, CombineEntry, ExpectEntry, FileEntry, Model
from merge_gate.config.words import described, label, nearest, quoted, wrong_value
from merge_gate.errors import ConfigError
from merge_gate.records import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from merge_gate.config.yaml_tree import Loc, Value

Entry = TypeVar("Entry", bound=Model)

_MODELS: dict[str, type[Model]] = {
    "base": BaseEntry,
    "adapters": AdapterEntry,
    "combine": CombineEntry,
    "expect": ExpectEntry,
    "checks": CheckEntry,
}
_MISSING = {"version": "write version: 1", "adapters": "list the adapters to judge"}


class Validated:
    """A file's values, the problems found so far, and the places that are already known to be wrong."""

    def __init__(self, path: str, root: Value, problems: list[Problem]) -> None:
        self.path, self.root, self.problems = path, root, list(problems)
        self.wrong: set[Loc] = set()
        if not isinstance(root.data, dict):
            if not root.broken:
                self.report((), f"the file must be a mapping, got {described(root)}", 'start with "version: 1"')
            self.raise_problems()
        self._validate()

    def raise_problems(self) -> None:
        """Raise a `ConfigError` if there are problems."""
        if self.problems:
            unique = dict.fromkeys(sorted(self.problems, key=lambda problem: (problem.line, problem.column)))
            raise ConfigError(tuple(unique)) from None

    def report(self, loc: Loc, message: str, hint: str = "", *, key: str | None = None) -> None:
        """Add a problem at the value at `loc`, or at the key `key` of the mapping there."""
        value, _ = self.root.locate(loc)
        line, column = (value.line, value.column) if key is None else value.keys.get(key, (value.line, value.column))
        self.problems.append(Problem(message=message, hint=hint, path=self.path, line=line, column=column))

    def report_unknown(self, loc: Loc, key: str, known: Iterable[str], kind: str) -> None:
        """Add a problem for a key that does not exist, with the nearest one that does."""
        names = list(known)
        hint = nearest(key, names) or f"known here: {', '.join(names)}"
        self.report(loc, f"unknown {kind} {quoted(key)}", hint, key=key)

    def present(self, loc: Loc) -> bool:
        """Say whether something stands at `loc`, right or wrong."""
        return self.root.locate(loc)[1] == loc

    def count(self, loc: Loc) -> int:
        """Return the length of the list at `loc`, 0 where there is none."""
        value, place = self.root.locate(loc)
        return len(value.data) if place == loc and isinstance(value.data, list) else 0

    def usable(self, model: type[Entry], loc: Loc) -> Entry | None:
        """Return the model at `loc` without the fields that are wrong; None where there is nothing to go on with."""
        value, place = self.root.locate(loc)
        data: Any = value.data
        if place != loc or data is None:
            return None
        if isinstance(data, dict):
            data = {key: item for key, item in data.items() if (*loc, key) not in self.wrong}
        elif model is not CheckEntry:
            data = {"path" if model is AdapterEntry else "model": data}
        else:
            data = {"severity": data}
        try:
            return model.model_validate(data)
        except ValidationError:
            return None

    def _validate(self) -> None:
        errors: list[Any] = []
        try:
            FileEntry.model_validate(self.root.data)
        except ValidationError as refused:
            errors = refused.errors(include_url=False, include_input=False)
        for error in errors:
            loc = error["loc"]
            self.wrong |= {loc[:depth] for depth in range(1, len(loc) + 1)}
            self._translate(error)
        self._report_nulls({error["loc"] for error in errors if error["type"] == "extra_forbidden"})

    def _translate(self, error: Mapping[str, Any]) -> None:
        loc: Loc = error["loc"]
        if error["type"] == "extra_forbidden":
            self.report_unknown(loc[:-1], str(loc[-1]), _keys_at(loc[:-1]), "key")
        elif error["type"] == "missing":
            self._missing(loc[:-1], str(loc[-1]))
        elif loc[-1:] == ("[key]",):
            self.report(loc[:-2], f"{quoted(str(loc[-2]))} cannot be a key here", "write a name", key=str(loc[-2]))
        else:
            value, place = self.root.locate(loc)
            if value.data is not None:  # an absent value and a broken one have problems of their own
                self.report(place, *wrong_value(error, value, place))

    def _missing(self, loc: Loc, key: str) -> None:
        value, place = self.root.locate(loc)
        if isinstance(value.data, dict):
            where = f" in {label(place)}" if place else ""
            self.report(place, f"{quoted(key)} is missing{where}", _MISSING.get(key, ""))

    def _report_nulls(self, unknown: set[Loc]) -> None:
        for loc, value in self.root.walk():
            hidden = any(loc[:depth] in unknown for depth in range(1, len(loc) + 1))
            if value.data is None and not value.broken and not hidden:
                self.report(loc, f"{label(loc)} has no value", "give it one, or remove it")


def _keys_at(loc: Loc) -> list[str]:
    """Return the keys that the mapping at `loc` may have."""
    model: type[Model] = FileEntry
    for step in loc:
        model = _MODELS.get(str(step), model)
    return [field.alias or name for name, field in model.model_fields.items()]
