"""The JSON of report.json, read off the records: each field's key, type, and sentence.

In: records whose fields are made by `reported`, or JSON of unknown origin. Out: JSON values, records, and `declared`,
from which the schema and the tables are made (tests/support/). Knows no particular record.
"""

# A non-finite float is null. A tuple of pairs is an object, in which such floats are strings. A tuple of records that
# is declared `as_rows` is a table: its columns, and one row for each record.

from __future__ import annotations

import math
from dataclasses import MISSING, fields, is_dataclass, replace
from enum import Enum
from functools import cache, partial
from operator import attrgetter
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from merge_gate._internal.strict_json import InvalidJsonError, parse_strictly
from merge_gate._internal.text import one_of, without_credentials
from merge_gate.records.terms import Severity, record
from merge_gate.report.wording.untrusted import one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

Json = Any

FIGURES = tuple[tuple[str, float], ...]
NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_WORD_OF = {str(figure): word for word, figure in NONFINITE.items()}
_ROW_DIGITS = 6
_LARGEST = 1 << 1000
"""Larger than any figure, and still a float. Python's integers are unbounded, and very long ones cannot be printed."""
_SHOWN_CHARACTERS = 60


class UnreadableError(Exception):
    """JSON that does not fit the records.

    `steps` lead to the wrong value, the last one first. They are put together on the way out, because a large report
    has half a million values and rarely a wrong one. Without any, the message is a whole sentence.
    """

    def __init__(self, message: str, *steps: str) -> None:
        super().__init__(message)
        self.message, self.steps = message, list(steps)

    def __str__(self) -> str:
        place = "".join(reversed(self.steps)).removeprefix(".") or "the document"
        return f"{place} {self.message}" if self.steps else self.message


@record
class Declared:
    """One field: its name in the record, its key in the file, its type, and its sentence.

    `is_needed`: it has no default. `is_derived`: the record computes the field from its other fields.
    """

    name: str
    key: str
    kind: Any
    description: str
    as_rows: bool
    is_needed: bool
    is_derived: bool

    @property
    def item(self) -> Any:
        """The type of a tuple's items."""
        return get_args(self.kind)[0]


@cache
def declared(cls: Any) -> tuple[Declared, ...]:
    """The fields of a record that the file has, in their order."""
    kinds = get_type_hints(cls)
    return tuple(
        Declared(
            name=field.name,
            key=field.metadata["key"] or field.name,
            kind=kinds[field.name],
            description=field.metadata["description"],
            as_rows=field.metadata["as_rows"],
            is_needed=field.default is MISSING,
            is_derived=not field.init,
        )
        for field in fields(cls)
        if "description" in field.metadata
    )


@cache
def columns(cls: Any) -> tuple[Declared, ...]:
    """The fields of a row. A record inside the record gives its own fields, named `stats.nan`."""
    listed: list[Declared] = []
    for field in declared(cls):
        inner = columns(field.kind) if is_record(field.kind) else ()
        listed += [replace(column, name=f"{field.name}.{column.name}") for column in inner] or [field]
    return tuple(listed)


def is_record(kind: Any) -> bool:
    return is_dataclass(kind)  # a function of its own, because mypy narrows by is_dataclass


@cache
def optional(kind: Any) -> tuple[Any, bool]:
    """(`str`, True) of `str | None`."""
    if get_origin(kind) is not UnionType:
        return kind, False
    (inner,) = (part for part in get_args(kind) if part is not NoneType)
    return inner, True


def words(kind: type[Enum]) -> list[str]:
    """The values of an enumeration that a report can hold. A check that is off finds nothing."""
    return [member.value for member in kind if member is not Severity.OFF]


# --- records to JSON -------------------------------------------------------------------------------------------------


def dump(value: Any) -> Json:
    """The JSON of a record, or of a value in it."""
    if value is None or type(value) in (int, bool):  # most values of a large report
        return value
    if isinstance(value, str):
        return text(str(value))  # an enumeration's member becomes its word
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, tuple):
        return [dump(item) for item in value]
    return dump_record(value)


def dump_record(value: Any, *, emptied: Collection[str] = ()) -> dict[str, Json]:
    """The JSON object of a record. The tuples that `emptied` names become empty arrays."""
    cls: Any = type(value)
    return {
        field.key: [] if field.name in emptied else _dump_field(getattr(value, field.name), field)
        for field in declared(cls)
    }


def _dump_field(value: Any, field: Declared) -> Json:
    if field.as_rows:
        cells_of = attrgetter(*(column.name for column in columns(field.item)))
        rows = [[_dump_cell(cell) for cell in cells_of(row)] for row in value]
        return {"columns": [column.key for column in columns(field.item)], "rows": rows}
    if field.kind == FIGURES:
        return {text(name): _WORD_OF.get(str(figure), figure) for name, figure in value}
    return dump(value)


def _dump_cell(value: Any) -> Json:
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.{_ROW_DIGITS}g}")
    return dump(value)


def text(value: str) -> str:
    """A text without the credentials of URLs, which an adapter may name as its base.

    A file name may hold bytes that are not UTF-8 (surrogates in Python). Strict parsers refuse them.
    """
    value = without_credentials(value)
    return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode("utf-8")


# --- JSON to records -------------------------------------------------------------------------------------------------


def load_document(kind: Any, data: bytes, version: str, tool: str) -> Any:
    """The record of type `kind` in a document with a `schema_version` and a `tool`, as one of this version.

    Raises:
        UnreadableError: it is not strict JSON, not of this tool, of no 1.x, or does not fit.
    """
    try:
        document = parse_strictly(data)
    except InvalidJsonError as error:
        raise UnreadableError(f"it {error}") from error
    stated = document.get("schema_version") if isinstance(document, dict) else None
    if isinstance(stated, str):  # anything else is refused as it is read
        if stated.split(".")[0] != "1":
            raise UnreadableError(f"schema_version is {one_line(stated, 20)}, expected 1.x")
        document["schema_version"] = version
    loaded = load(kind, document, "")
    if loaded.tool.name != tool:
        raise UnreadableError(f"tool.name is {one_line(loaded.tool.name, 20)}, expected {tool}")
    return loaded


def load(kind: Any, value: Json, place: str) -> Any:
    """The value of type `kind` that the JSON describes.

    Keys that no record has are ignored, because a later 1.x may have written them. Absent keys get the default of the
    record.

    Raises:
        UnreadableError: the JSON does not fit. The message names `place` and the way from there.
    """
    return _at(place, _reader(kind), value)


def _at(step: str, read: Callable[[Json], Any], value: Json) -> Any:
    try:
        return read(value)
    except UnreadableError as wrong:
        wrong.steps.append(step)
        raise


@cache
def _reader(kind: Any) -> Callable[[Json], Any]:
    """Takes JSON, and returns the value. Each type has one."""
    inner, may_be_null = optional(kind)
    if may_be_null:
        read = _reader(inner)
        return lambda value: None if value is None else read(value)
    if kind in _PLAIN:
        return partial(_read_plain, kind)
    if is_record(kind):
        return _record_reader(kind)
    if kind == FIGURES:
        return _read_figures
    if get_origin(kind) is tuple:
        return partial(_read_tuple, _reader(get_args(kind)[0]))
    return partial(_read_word, kind)


def _record_reader(cls: Any) -> Callable[[Json], Any]:
    derived = tuple(field for field in declared(cls) if field.is_derived)
    readers = tuple(
        (
            field.name,
            field.key,
            f".{field.key}",
            partial(_read_table, field.item) if field.as_rows else _reader(field.kind),
            field.is_needed,
        )
        for field in declared(cls)
    )

    def read(value: Json) -> Any:
        _read_plain(dict, value)
        loaded, step = {}, ""
        try:
            for name, key, step, read_field, is_needed in readers:  # noqa: B007
                if key in value:
                    loaded[name] = read_field(value[key])
                elif is_needed:
                    raise UnreadableError("is missing")  # noqa: TRY301 - at this step
        except UnreadableError as wrong:
            wrong.steps.append(step)
            raise
        stated = [(field, loaded.pop(field.name)) for field in derived if field.name in loaded]
        made = cls(**loaded)
        for field, figure in stated:
            if getattr(made, field.name) != figure:
                raise UnreadableError("does not follow from the rest of the report", f".{field.key}")
        return made

    return read


def _read_tuple(read: Callable[[Json], Any], value: Json) -> tuple[Any, ...]:
    _read_plain(list, value)
    loaded: list[Any] = []
    try:
        for item in value:
            loaded.append(read(item))  # noqa: PERF401 - their number is the place of a wrong item
    except UnreadableError as wrong:
        wrong.steps.append(f"[{len(loaded)}]")
        raise
    return tuple(loaded)


def _read_table(cls: Any, value: Json) -> tuple[Any, ...]:
    """Records from rows. A record inside of a row shares the row's cells."""
    _read_plain(dict, value)
    keys = _at(".columns", _reader(tuple[str, ...]), value.get("columns"))
    inside = [field.key for field in declared(cls) if is_record(field.kind)]
    read_record = _reader(cls)

    def read_row(row: Json) -> Any:
        if len(_read_plain(list, row)) != len(keys):
            raise UnreadableError(f"has {len(row)} cells, expected one for each of {len(keys)} columns")
        cells = dict(zip(keys, row, strict=True))
        for key in inside:
            cells[key] = cells
        return read_record(cells)

    return _at(".rows", partial(_read_tuple, read_row), value.get("rows"))  # type: ignore[no-any-return]


def _read_figures(value: Json) -> tuple[tuple[str, float], ...]:
    return tuple((name, _at(f".{name}", _read_figure, figure)) for name, figure in _read_plain(dict, value).items())


def _read_figure(value: Json) -> float:
    if isinstance(value, str) and value in NONFINITE:
        return NONFINITE[value]
    return _read_plain(float, value)  # type: ignore[no-any-return]


def _read_word(kind: type[Enum], value: Json) -> Enum:
    expected = words(kind)
    if not isinstance(value, str) or value not in expected:
        raise UnreadableError(f"is {_shown(value)}, expected {one_of(expected)}")
    return kind(value)


_PLAIN = {
    str: "a text",
    bool: "true or false",
    int: "a number that is whole and not negative",
    float: "a number",
    dict: "an object",
    list: "an array",
}


def _read_plain(kind: Any, value: Json) -> Any:
    if type(value) is kind and (kind is not int or 0 <= value < _LARGEST):  # nearly all values
        return value
    if kind is float and value is None:
        return math.nan
    if kind is float and type(value) is int and -_LARGEST < value < _LARGEST:
        return value
    raise UnreadableError(f"is {_shown(value)}, expected {_PLAIN[kind]}")


def _shown(value: Json) -> str:
    return _PLAIN[type(value)] if isinstance(value, dict | list) else one_line(repr(value), _SHOWN_CHARACTERS)
