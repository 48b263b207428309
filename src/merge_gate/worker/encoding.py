"""Records as bytes, and back. Only data is read: each value must have the type that the record declares.

The bytes are JSON of Python's own module: a record is `{"Name": [values in the order of its fields]}`, tuples and sets
are lists, and mappings are objects. NaN, infinities, and names that are not UTF-8 pass. Nothing in them is shared, so
memory and time are proportional to their length.

`msgspec` was tried in its place. It ignores unknown fields of dataclasses, turns whole numbers into floats, cannot tell
the two records of a union apart, and refuses names that are not UTF-8.
"""

from __future__ import annotations

import functools
import gc
import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, NamedTuple

from merge_gate._internal.text import quoted
from merge_gate.records.features import parts

Read = Callable[[Any], object]
Cases = dict[type, Read | None]
"""What becomes of a value of each JSON type: it is kept (None), or read further. Other types are refused."""


class GarbledError(Exception):
    """The received bytes are not a message."""


class EncodingError(Exception):
    """A value of a record cannot be sent."""


class Limits(NamedTuple):
    """The most bytes of a message, and the most values that may be made of it.

    A fourth of the values may be lists or records, a tenth may have keys, and an eighth fractions.
    """

    bytes: int
    values: int


# --- to bytes --------------------------------------------------------------------------------------------------------


def encoded(message: object) -> bytes:
    """A record as bytes.

    Raises:
        EncodingError: it has a value that is neither a record nor plain data.
    """
    try:
        return _ENCODER.encode(message).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise EncodingError(
            f"{type(message).__name__} cannot be sent: {type(error).__name__}: {error}"[:400]
        ) from error


def _plain(value: Any) -> object:
    kind = type(value)
    if is_dataclass(kind):
        return {kind.__name__: [getattr(value, name) for name in _names(kind)]}
    if kind is frozenset:
        return list(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{kind.__name__} is no plain value")


@functools.cache
def _names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


_ENCODER = json.JSONEncoder(default=_plain, separators=(",", ":"), check_circular=False)


# --- from bytes ------------------------------------------------------------------------------------------------------


def decoded(data: bytes, expected: Any, limits: Limits | None = None) -> Any:
    """The record of these bytes, which must be one of the expected types (a record, or a union of several).

    Raises:
        GarbledError: it is none, or exceeds the limits.
    """
    zeros = data.translate(_DIGITS)
    if limits is not None:
        _check(data, zeros, limits)
    decoder = _CAREFUL if _LONG in zeros else _DECODER
    collects = gc.isenabled()
    gc.disable()  # the collections would find nothing, and take half of the time
    try:
        return _read(cases(expected), decoder.decode(data.decode("ascii")))
    except GarbledError:
        raise
    except KeyError as error:
        raise GarbledError(f"a value of another type than its record declares ({error.args[0].__name__})") from error
    except Exception as error:
        raise GarbledError(f"{type(error).__name__}: {error}"[:200]) from error
    finally:
        if collects:
            gc.enable()


_DIGITS = bytes(ord("0") if chr(byte).isdecimal() and byte < 128 else byte for byte in range(256))  # noqa: PLR2004 - ASCII
_LONG = b"0" * 20  # the largest number of 64 bits has so many digits
_FRACTIONS = b"0.0", b"0e", b"0E"


def _check(data: bytes, zeros: bytes, limits: Limits) -> None:
    """Count what would be made of these bytes, before any of it is. `zeros` has a 0 for each digit.

    Lists, keys, and fractions take several times as long as other values, so fewer are allowed.

    Raises:
        GarbledError: it is more than the limits allow.
    """
    lists = data.count(b"[") + data.count(b"{")
    counts = {
        "values": (data.count(b",") + lists, 1),  # each value follows one of these bytes
        "lists": (lists, 4),
        "keys": (data.count(b":"), 10),
        "fractions": (sum(map(zeros.count, _FRACTIONS)), 8),
    }
    for what, (count, share) in counts.items():
        if count > limits.values // share:
            raise GarbledError(f"a message of {count:,} {what}")


def _in_64_bits(text: str) -> int:
    if len(text) < len(_LONG):
        return int(text)
    number = int(text)
    if not -(2**63) <= number < 2**64:
        raise ValueError("a number has more than 64 bits")
    return number


_DECODER, _CAREFUL = json.JSONDecoder(), json.JSONDecoder(parse_int=_in_64_bits)


def _read(how: Cases, value: Any) -> object:
    read = how[type(value)]
    return value if read is None else read(value)


@functools.cache
def cases(hint: Any) -> Cases:
    """How values of a type are read.

    Raises:
        TypeError: records must not have this type.
    """
    found: Cases = {}
    records: dict[str, type] = {}
    for option in typing.get_args(hint) if isinstance(hint, UnionType) else (hint,):
        if isinstance(option, type) and is_dataclass(option):
            records[option.__name__] = option
        else:
            found |= _PLAIN[option] if option in _PLAIN else _cases_of_one(option)
    if records:
        found[dict] = functools.partial(_record, records)
    return found


_PLAIN: dict[Any, Cases] = {
    str: {str: None},
    int: {int: None},
    bool: {bool: None},
    NoneType: {NoneType: None},
    float: {float: None, int: None},  # a whole number stays one
}


def _cases_of_one(option: Any) -> Cases:
    """Cases of a type that is neither plain, nor a record, nor a union."""
    origin, args = typing.get_origin(option), typing.get_args(option)
    if option in (object, Any):
        return _declared("FACT" if option is object else "SETTINGS")
    if isinstance(option, type) and issubclass(option, Enum):
        return {str: option}
    if origin is Mapping:
        return {dict: functools.partial(_mapping, cases(args[1]))}
    if origin is tuple and args[-1] is not ...:
        return {list: functools.partial(_fixed, [cases(arg) for arg in args])}
    if origin in (tuple, frozenset):
        item = cases(args[0])
        kept = frozenset(kind for kind, read in item.items() if read is None)
        return {list: functools.partial(_items, item, kept, origin)}
    raise TypeError(f"{option} cannot be read")


def _declared(name: str) -> Cases:
    """The types that features declare for what they add to a record."""
    hint: Any = NoneType
    for _, module in parts("records"):
        hint |= vars(module).get(name, NoneType)
    return cases(hint)


def _items(how: Cases, kept: frozenset[type], kind: type, values: list[Any]) -> object:
    if kept.issuperset(map(type, values)):
        return kind(values)
    return kind([value if (read := how[type(value)]) is None else read(value) for value in values])


def _fixed(how: list[Cases], values: list[Any]) -> object:
    pairs = zip(how, values, strict=True)
    return tuple([value if (read := case[type(value)]) is None else read(value) for case, value in pairs])


def _mapping(how: Cases, values: dict[str, Any]) -> object:
    return {key: _read(how, value) for key, value in values.items()}


def _record(records: Mapping[str, type], tagged: dict[str, Any]) -> object:
    ((name, values),) = tagged.items()
    if name not in records or type(values) is not list:
        raise GarbledError(quoted(name, 80, mark=""))
    return _reader(records[name])(values)


_MOST_PLANS = 256
"""Code of a base may send values of ever other types."""


@functools.cache
def _reader(kind: type) -> Callable[[list[Any]], object]:
    """Make a record of the values of its fields, in their order."""
    names, hints = _names(kind), typing.get_type_hints(kind)
    how = [cases(hints[name]) for name in names]
    fill = [getattr(kind, name).__set__ for name in names]  # in a third of the time of the record's own `__init__`
    plans: dict[tuple[type, ...], list[tuple[int, Read]]] = {}

    def read(values: list[Any]) -> object:
        types = tuple(map(type, values))
        plan = plans.get(types)
        if plan is None:  # which values have to be read further: for most records, always the same
            reads = [case[each] for case, each in zip(how, types, strict=True)]
            plan = [(at, further) for at, further in enumerate(reads) if further is not None]
            if len(plans) < _MOST_PLANS:
                plans[types] = plan
        for at, further in plan:
            values[at] = further(values[at])
        record: object = object.__new__(kind)
        for put, value in zip(fill, values, strict=True):
            put(record, value)
        return record

    return read
