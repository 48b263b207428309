"""The JSON object in a file of an adapter or a base: read strictly, or as transformers reads it.

In: the bytes of the file, or its hostile path. Out: the object, or why there is none. Knows no file's meaning.
"""

from __future__ import annotations

import codecs
import json
from typing import TYPE_CHECKING, Any

from merge_gate._internal.regular_file import open_regular_file, read_all
from merge_gate._internal.strict_json import InvalidJsonError, parse_strictly

if TYPE_CHECKING:
    from pathlib import Path

LONGEST_BYTES = 200_000_000
"""The most that is read of one file."""

_MARKED = "an editor has put it there: save the file as UTF-8 without BOM"
_EDITED = "correct the file at that place if it was edited; else save the adapter again with save_pretrained"


class InvalidObjectError(Exception):
    """The text is not one JSON object. The message continues a sentence that starts with the file's name.

    `hint` says what to do, unless that is to write the file again.
    """

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint


def parse(raw: bytes) -> dict[str, Any]:
    """The object in the file. Raises `InvalidObjectError` for anything that strict JSON does not allow."""
    if raw.startswith(codecs.BOM_UTF8):
        raise InvalidObjectError("is not valid JSON: it begins with a byte order mark, which PEFT cannot read", _MARKED)
    try:
        value = parse_strictly(raw)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # finds 1e999 and lone surrogates
    except InvalidJsonError as error:
        raise InvalidObjectError(str(error), _EDITED if error.is_syntax else "") from None
    except UnicodeEncodeError:
        raise InvalidObjectError("holds a lone surrogate, which UTF-8 does not have") from None
    except RecursionError:
        raise InvalidObjectError("is nested too deeply") from None
    except ValueError:
        raise InvalidObjectError("holds a number that is too large for a float") from None
    if not isinstance(value, dict):
        raise InvalidObjectError(f"holds {kind(value)}, expected a JSON object")
    return value


def read_as_transformers(path: str | Path, max_bytes: int = LONGEST_BYTES) -> dict[str, Any] | None:
    """The object in a file that may lie behind a link; None if there is none. NaN and repeated keys are allowed."""
    try:
        with open_regular_file(path, follow=True) as file:
            value = json.loads(read_all(file, max_bytes))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


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
