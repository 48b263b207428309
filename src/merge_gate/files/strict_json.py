"""A JSON object, read strictly: what two readers could understand in two ways is refused.

In: the bytes of a file, which are hostile. Out: the object, or `InvalidJsonError`. Knows no file's meaning.
"""

from __future__ import annotations

import codecs
import json
from typing import Any, NoReturn

from merge_gate.files.headers import shown

_MARKED = "an editor has put it there: save the file as UTF-8 without BOM"
_EDITED = "correct the file at that place if somebody has edited it; else save the adapter again with save_pretrained"


class InvalidJsonError(Exception):
    """The text is not one JSON object. The message continues a sentence that starts with the file's name.

    `hint` says what to do, where that is not to write the file anew.
    """

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint


def parse(raw: bytes) -> dict[str, Any]:
    """The object in the file. Raises `InvalidJsonError` for anything that strict JSON does not allow."""
    if raw.startswith(codecs.BOM_UTF8):
        raise InvalidJsonError("is not valid JSON: it begins with a byte order mark, which PEFT cannot read", _MARKED)
    try:
        value = _loaded(raw.decode("utf-8"))
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # finds 1e999 and lone surrogates
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise InvalidJsonError(f"is not UTF-8 text: {error.reason}") from None
    except RecursionError:
        raise InvalidJsonError("is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise InvalidJsonError(f"is not valid JSON: {error}", _EDITED) from None
    except ValueError:
        raise InvalidJsonError("holds a number that is too large for a float") from None
    if not isinstance(value, dict):
        raise InvalidJsonError(f"holds {kind(value)}, expected a JSON object")
    return value


def _loaded(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError:
        raise
    except ValueError:  # of int(), which reads so many digits and no more
        raise InvalidJsonError("holds an integer with more digits than are read, expected one of 64 bits") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for key, value in pairs:
        if key in entries:
            raise InvalidJsonError(f"has the key {shown(key)} twice; which one counts depends on the reader")
        entries[key] = value
    return entries


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidJsonError(f"holds {name}, which is not a JSON number")


def kind(value: Any) -> str:
    """A JSON value's kind in words."""
    if value is None:
        return "null"
    names = (
        (bool, "true or false"),
        (str, "a string"),
        (int | float, "a number"),
        (list, "a list"),
        (dict, "an object"),
    )
    return next(name for cls, name in names if isinstance(value, cls))
