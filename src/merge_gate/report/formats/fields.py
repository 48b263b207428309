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
from functools import cache, lru_cache, partial
from operator import attrgetter
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from merge_gate.records.terms import Severity, record
from merge_gate.report.wording.untrusted import one_line
from merge_gate.text import one_of

if TYPE_CHECKING:
    from collections.abc import Callable

Json = Any

FIGURES = tuple[tuple[str, float], ...]
NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_ROW_DIGITS = 6
_AS_THEY_ARE = (int, bool)
_ENDLESS = 1 << 1000
"""No number is as large that a float can hold. Python's whole numbers have no end, and not all can be printed."""
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
        return text(str(value))  # of an enumeration, its word
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

# A reader takes JSON and returns the value. There is one for each kind, made once. The place of what is wrong is put
# together on the way out, since a fleet's report has half a million values in which nothing is.


class _WrongError(Exception):
    """What is wrong, and the steps to it, the last one first."""

    def __init__(self, said: str) -> None:
        self.said, self.steps = said, list[str]()

    def within(self, step: str) -> None:
        self.steps.append(step)


def load(kind: Any, value: Json, place: str) -> Any:
    """The value of a field of type `kind`.

    Keys that no record knows are ignored (a later 1.x wrote them); keys that are absent have the record's default.

    Raises:
        UnreadableError: it is none; `place` and the way from there are named.
    """
    try:
        return _reader(kind)(value)
    except _WrongError as wrong:
        where = (place + "".join(reversed(wrong.steps))).removeprefix("." if not place else "")
        raise UnreadableError(f"{where or 'the document'} {wrong.said}") from None


@cache
def _reader(kind: Any) -> Callable[[Json], Any]:
    inner, may_be_null = optional(kind)
    read = _reader_of(inner)
    if not may_be_null:
        return read
    return lambda value: None if value is None else read(value)


def _reader_of(kind: Any) -> Callable[[Json], Any]:
    if kind in _PLAIN:
        return partial(_read_plain, kind)
    if is_record(kind):
        return partial(_read_record, kind)
    if kind == FIGURES:
        return _read_figures
    if get_origin(kind) is tuple:
        return partial(_read_tuple, _reader(get_args(kind)[0]))
    return partial(_read_word, kind)


def _read_record(cls: Any, value: Json) -> Any:
    _expect(value, dict, "an object")
    loaded = {}
    for name, key, read, is_needed in _readers(cls):
        if key in value:
            try:
                loaded[name] = read(value[key])
            except _WrongError as wrong:
                wrong.within(f".{key}")
                raise
        elif is_needed:
            raise _missing(key)
    return cls(**loaded)


@cache
def _readers(cls: Any) -> tuple[tuple[str, str, Callable[[Json], Any], bool], ...]:
    return tuple(
        (one.name, one.key, partial(_read_rows, one.item) if one.as_rows else _reader(one.kind), one.default is MISSING)
        for one in declared(cls)
    )


def _missing(key: str) -> _WrongError:
    wrong = _WrongError("is missing")
    wrong.within(f".{key}")
    return wrong


def _read_tuple(read: Callable[[Json], Any], value: Json) -> tuple[Any, ...]:
    _expect(value, list, "an array")
    loaded: list[Any] = []
    try:
        for one in value:
            loaded.append(read(one))  # noqa: PERF401 - their number is the place of the one that is wrong
    except _WrongError as wrong:
        wrong.within(f"[{len(loaded)}]")
        raise
    return tuple(loaded)


def _read_rows(cls: Any, value: Json) -> tuple[Any, ...]:
    _expect(value, dict, "an object")
    try:
        keys = _reader(tuple[str, ...])(value.get("columns"))
    except _WrongError as wrong:
        wrong.within(".columns")
        raise
    try:
        return _read_tuple(partial(_read_row, _row_maker(cls, keys), len(keys)), value.get("rows"))
    except _WrongError as wrong:
        wrong.within(".rows")
        raise


def _read_row(make: Callable[[list[Json]], Any], width: int, row: Json) -> Any:
    _expect(row, list, "an array")
    if len(row) != width:
        raise _WrongError(f"has {len(row)} cells, expected one for each of {width} columns")
    return make(row)


@lru_cache(maxsize=16)  # the columns are whatever a file says
def _row_maker(cls: Any, keys: tuple[str, ...]) -> Callable[[list[Json]], Any]:
    """How a row becomes a record; those inside of it stand in the same row."""
    place_of = {key: index for index, key in enumerate(keys)}
    steps: list[tuple[str, str, Callable[[list[Json]], Any]]] = []
    absent: str | None = None
    for one in declared(cls):
        if is_record(one.kind):
            steps.append((one.name, one.key, _row_maker(one.kind, keys)))
        elif one.key in place_of:
            steps.append((one.name, one.key, _cell_reader(_reader(one.kind), place_of[one.key])))
        elif one.default is MISSING:
            absent = one.key
            break

    def make(row: list[Json]) -> Any:
        loaded = {}
        for name, key, read in steps:
            try:
                loaded[name] = read(row)
            except _WrongError as wrong:
                wrong.within(f".{key}")
                raise
        if absent is not None:
            raise _missing(absent)
        return cls(**loaded)

    return make


def _cell_reader(read: Callable[[Json], Any], index: int) -> Callable[[list[Json]], Any]:
    return lambda row: read(row[index])


def _read_figures(value: Json) -> tuple[tuple[str, float], ...]:
    _expect(value, dict, "an object")
    loaded: list[tuple[str, float]] = []
    for name, one in value.items():
        try:
            loaded.append((name, _read_figure(one)))
        except _WrongError as wrong:
            wrong.within(f".{name}")
            raise
    return tuple(loaded)


def _read_figure(value: Json) -> float:
    if isinstance(value, str) and value in NONFINITE:
        return NONFINITE[value]
    return _read_plain(float, value)  # type: ignore[no-any-return]


def _read_word(kind: type[Enum], value: Json) -> Enum:
    known = words(kind)
    if not isinstance(value, str) or value not in known:
        raise _WrongError(f"is {_shown(value)}, expected {one_of(known)}")
    return kind(value)


_PLAIN = {str: "a text", bool: "true or false", int: "a number that is whole and not negative", float: "a number"}


def _read_plain(kind: Any, value: Json) -> Any:
    if type(value) is kind and (kind is not int or 0 <= value < _ENDLESS):  # nearly all
        return value
    if kind is float and value is None:
        return math.nan
    if kind is float and type(value) is int and -_ENDLESS < value < _ENDLESS:
        return value
    raise _WrongError(f"is {_shown(value)}, expected {_PLAIN[kind]}")


def _expect(value: Json, kind: type, name: str) -> None:
    if not isinstance(value, kind):
        raise _WrongError(f"is {_shown(value)}, expected {name}")


def _shown(value: Json) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    return one_line(repr(value), _SHOWN)
