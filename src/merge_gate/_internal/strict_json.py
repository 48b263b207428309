"""JSON of unknown origin, read strictly: nothing that two readers could understand in two ways.

In: bytes. Out: the value, or an error that names the problem. Standard library of Python 3.9 only.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn

from merge_gate._internal.text import quoted

if TYPE_CHECKING:
    from collections.abc import Callable

_SHOWN_CHARACTERS = 120


class InvalidJsonError(Exception):
    """The bytes are not strict JSON. The text continues a sentence that begins with their name.

    `is_syntax`: the error is one of spelling, as an editor leaves it.
    """

    def __init__(self, text: str, *, is_syntax: bool = False) -> None:
        super().__init__(text)
        self.is_syntax = is_syntax


def parse_strictly(
    raw: bytes,
    *,
    integer: Callable[[str], int] = int,
    other_number: Callable[[str], float] = float,
    constant: Callable[[str], float] | None = None,
) -> Any:
    """The value that the bytes say.

    Args:
        raw: JSON in UTF-8.
        integer: makes a number of the digits of an integer.
        other_number: makes a number of any other one.
        constant: makes a number of NaN and Infinity, which are refused without it.

    Raises:
        InvalidJsonError: it is not UTF-8 or not JSON, it names a key twice in one object, holds NaN or Infinity, is
            nested too deeply, or holds more digits than Python reads. Errors of the arguments pass.
    """
    try:
        text = raw.decode("utf-8")
        return json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=constant or _refuse_constant,
            parse_int=integer,
            parse_float=other_number,
        )
    except UnicodeDecodeError as error:
        raise InvalidJsonError(f"is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise InvalidJsonError("is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise InvalidJsonError(f"is not valid JSON: {error}", is_syntax=True) from None
    except ValueError:  # int() reads so many digits and no more
        raise InvalidJsonError("holds an integer with more digits than are read, expected one of 64 bits") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InvalidJsonError(
            f"has the key {quoted(twice, _SHOWN_CHARACTERS, chr(39))} twice in one object; which one counts depends on "
            "the reader"
        )
    return entries


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidJsonError(f"holds {name}, which is not a JSON number")
