"""What report.json has, read off the records: each field's key, kind and sentence, and values ↔ JSON.

In: records whose fields are `told`, or JSON of unknown origin. Out: JSON values, records, and `declared`, from which
schema.py makes schema and tables. Raises `UnreadableError` where JSON is not what the records say. Knows no report.

A float that is not finite is null; a tuple of pairs is an object, in which such floats are strings; a tuple of many
records is a table of rows.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from operator import attrgetter
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from merge_gate.records.terms import Severity, record
from merge_gate.report.untrusted import one_line
from merge_gate.text import one_of

if TYPE_CHECKING:
    from collections.abc import Callable

Json = Any

FIGURES = tuple[tuple[str, float], ...]
NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_ROW_DIGITS = 6
_AS_THEY_ARE = (int, bool)
_SHOWN = 60


class UnreadableError(Exception):
    """JSON that does not say what the records say; the message names the place."""


@record
class Declared:
    """One field: its name in the record, its key in the file, its type, its sentence."""

    name: str
    key: str
    kind: Any
    told: str
    default: Any
    as_rows: bool

    @property
    def item(self) -> Any:
        """What a tuple holds."""
        return get_args(self.kind)[0]


@cache
def declared(cls: Any) -> tuple[Declared, ...]:
    """The fields of a record that the file has, in their order."""
    kinds = get_type_hints(cls)
    return tuple(
        Declared(
            name=one.name,
            key=one.metadata["key"] or one.name,
            kind=kinds[one.name],
            told=one.metadata["told"],
            default=one.default,
            as_rows=one.metadata["as_rows"],
        )
        for one in fields(cls)
        if "told" in one.metadata
    )


@cache
def columns(cls: Any) -> tuple[Declared, ...]:
    """The fields of a row: those of records inside of it stand in their place."""
    return tuple(column for one in declared(cls) for column in (columns(one.kind) if is_record(one.kind) else (one,)))


def _declared_of(value: Any) -> tuple[Declared, ...]:
    cls: Any = type(value)
    return declared(cls)


def is_record(kind: Any) -> bool:
    """Whether a type, or a value, is one of the records."""
    return is_dataclass(kind)


@cache
def optional(kind: Any) -> tuple[Any, bool]:
    """(`str`, True) of `str | None`."""
    if get_origin(kind) is not UnionType:
        return kind, False
    (inner,) = (one for one in get_args(kind) if one is not NoneType)
    return inner, True


def words(kind: type[Enum]) -> list[str]:
    """The values of an enumeration that a report can hold: a check that is off finds nothing."""
    return [one.value for one in kind if one is not Severity.OFF]


# --- out -----------------------------------------------------------------------------------------------------------


def dump(value: Any) -> Json:
    """A record, or what one holds, as JSON."""
    if value is None or type(value) in _AS_THEY_ARE:  # most of what a fleet's report holds
        return value
    if isinstance(value, str):
        return text(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, tuple):
        return [dump(one) for one in value]
    return {one.key: _field(getattr(value, one.name), one) for one in _declared_of(value)}


def _field(value: Any, one: Declared) -> Json:
    if one.as_rows:
        cells_of = _cells_of(one.item)
        rows = [[_cell(cell) for cell in cells_of(row)] for row in value]
        return {"columns": [column.key for column in columns(one.item)], "rows": rows}
    if one.kind == FIGURES:
        return {text(name): _figure(figure) for name, figure in value}
    return dump(value)


@cache
def _cells_of(cls: Any) -> Callable[[Any], tuple[Any, ...]]:
    """Get the values of a row from its record; those of records inside of it in their place."""

    def paths(cls: Any) -> list[str]:
        names = [(one.name, paths(one.kind) if is_record(one.kind) else []) for one in declared(cls)]
        return [f"{name}.{rest}" if rest else name for name, inner in names for rest in inner or [""]]

    return attrgetter(*paths(cls))


def _cell(value: Any) -> Json:
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.{_ROW_DIGITS}g}")
    return dump(value)


def _figure(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def text(value: str) -> str:
    """A file name may hold bytes that are not UTF-8 (surrogates in Python); strict parsers refuse them."""
    return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode("utf-8")


# --- in ------------------------------------------------------------------------------------------------------------


def load(kind: Any, value: Json, place: str) -> Any:
    """The value of a field of type `kind`.

    Keys that no record knows are ignored (a later 1.x wrote them); keys that are absent have the record's default.
    """
    inner, may_be_null = optional(kind)
    if value is None and may_be_null:
        return None
    if inner in _PLAIN:
        return _load_plain(inner, value, place)
    if is_record(inner):
        return _load_record(inner, _expect(value, dict, "an object", place), place)
    if inner == FIGURES:
        return tuple((name, _load_figure(one, f"{place}.{name}")) for name, one in _object(value, place))
    if get_origin(inner) is tuple:
        items = _expect(value, list, "an array", place)
        return tuple(load(get_args(inner)[0], one, f"{place}[{index}]") for index, one in enumerate(items))
    return _load_word(inner, value, place)


def _load_record(cls: Any, value: dict[str, Json], place: str) -> Any:
    loaded = {}
    for one in declared(cls):
        where = f"{place}.{one.key}" if place else one.key
        if one.key in value:
            known = value[one.key]
            loaded[one.name] = _load_rows(one.item, known, where) if one.as_rows else load(one.kind, known, where)
        elif one.default is MISSING:
            raise UnreadableError(f"{where} is missing")
    return cls(**loaded)


def _load_rows(cls: Any, value: Json, place: str) -> tuple[Any, ...]:
    table = _expect(value, dict, "an object", place)
    keys = load(tuple[str, ...], table.get("columns"), f"{place}.columns")
    rows = _expect(table.get("rows"), list, "an array", f"{place}.rows")
    return tuple(_load_row(cls, keys, row, f"{place}.rows[{index}]") for index, row in enumerate(rows))


def _load_row(cls: Any, keys: tuple[str, ...], row: Json, place: str) -> Any:
    cells = _expect(row, list, "an array", place)
    if len(cells) != len(keys):
        raise UnreadableError(f"{place} has {len(cells)} cells, expected one for each of {len(keys)} columns")
    return _load_record(cls, _nested(cls, dict(zip(keys, cells, strict=True))), place)


def _nested(cls: Any, flat: dict[str, Json]) -> dict[str, Json]:
    inner = {one.key: _nested(one.kind, flat) for one in declared(cls) if is_record(one.kind)}
    return flat | inner


def _load_figure(value: Json, place: str) -> float:
    if isinstance(value, str) and value in NONFINITE:
        return NONFINITE[value]
    return _load_plain(float, value, place)  # type: ignore[no-any-return]


def _load_word(kind: type[Enum], value: Json, place: str) -> Enum:
    known = words(kind)
    if not isinstance(value, str) or value not in known:
        raise UnreadableError(f"{place} is {_shown(value)}, expected {one_of(known)}")
    return kind(value)


_PLAIN = {str: "a text", bool: "true or false", int: "a number that is whole and not negative", float: "a number"}


def _load_plain(kind: Any, value: Json, place: str) -> Any:
    if kind is float:
        if value is None:
            return math.nan
        kinds: tuple[type, ...] = (int, float)
    else:
        kinds = (kind,)
    is_kind = isinstance(value, kinds) and (kind is bool) == isinstance(value, bool)
    if not is_kind or (kind is int and value < 0):
        raise UnreadableError(f"{place} is {_shown(value)}, expected {_PLAIN[kind]}")
    return value


def _object(value: Json, place: str) -> list[tuple[str, Json]]:
    return list(_expect(value, dict, "an object", place).items())


def _expect(value: Json, kind: type, name: str, place: str) -> Any:
    if not isinstance(value, kind):
        raise UnreadableError(f"{place or 'the document'} is {_shown(value)}, expected {name}")
    return value


def _shown(value: Json) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    return one_line(repr(value), _SHOWN)
