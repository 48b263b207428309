"""The words of configuration problems: values as they are quoted, suggestions, and pydantic's errors put plainly.

In: texts, and the error records of pydantic with the value they are about. Out: message and hint. Knows neither files
nor models; every text from outside is escaped and shortened here.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from merge_gate.config.yaml_tree import Loc, Value

SHOWN = 60
COMPARED = 200

CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
"""What no text may hold: controls, bidirectional overrides, invisible characters, surrogates."""

TEXT = r"\S"
HEX_64 = r"^[0-9a-fA-F]{64}$"
PEFT_TYPE = r"^[A-Za-z][A-Za-z0-9_]*$"
PATTERNS = {
    TEXT: "some text",
    HEX_64: "64 hexadecimal digits, as sha256sum prints them",
    PEFT_TYPE: "a PEFT type such as LORA",
}
"""The patterns of the models, and what each one asks for."""

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
_EMPTY = {"adapters": "a gate that checks nothing proves nothing: list at least one adapter"}
_OTHER_NAMES = {
    "fp16": "float16", "f16": "float16", "half": "float16", "torch.float16": "float16",
    "fp32": "float32", "f32": "float32", "float": "float32", "full": "float32", "torch.float32": "float32",
    "torch.bfloat16": "bfloat16", "8bit": "bnb-8bit", "int8": "bnb-8bit", "4bit": "bnb-4bit", "nf4": "bnb-4bit",
    "warn": "warning", "err": "error", "fail": "error", "ignore": "off", "skip": "off", "disabled": "off",
}  # fmt: skip


def quoted(text: str) -> str:
    """Return `text` in double quotes, shortened, with everything unprintable escaped."""
    shown = text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
    return '"' + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown) + '"'


def listed(words: Iterable[str]) -> str:
    """Return the words, separated by commas, at most ten of them."""
    known = list(words)
    more = f", … ({len(known)} in all)" if len(known) > 10 else ""  # noqa: PLR2004
    return ", ".join(known[:10]) + more


def nearest(word: str, known: Iterable[str], *, before: str = "") -> str:
    """Return `did you mean "x"?` for the known word that is most like `word`, else an empty text.

    `before` is put in front of the known word: the part of a path that was right.
    """
    candidates = list(known)[:COMPARED]
    if len(word) > COMPARED:
        return ""
    plain = {candidate.lower().replace("_", "-"): candidate for candidate in candidates}
    other = _OTHER_NAMES.get(word.lower(), "")
    close = [other] if other in plain else get_close_matches(word.lower().replace("_", "-"), plain, 1)
    return f"did you mean {quoted(before + plain[close[0]])}?" if close else ""


def described(value: Value) -> str:
    """Say what stands in the file: `the number 12`, `the text "x"`, `a list`."""
    if isinstance(value.data, bool):
        return f"{value.raw} (which YAML reads as {str(value.data).lower()})"
    if isinstance(value.data, int | float):
        return f"the number {quoted(value.raw)[1:-1]}"
    if isinstance(value.data, str):
        return f"the text {quoted(value.data)}"
    if isinstance(value.data, list):
        return f"a list of {len(value.data)}" if value.data else "an empty list"
    return "a mapping" if isinstance(value.data, dict) else "nothing"


def label(loc: Loc) -> str:
    """Name a place by its key, or by its number in a list."""
    if not loc:
        return "the file"
    if isinstance(loc[-1], int):
        return f"entry {loc[-1] + 1} of {label(loc[:-1])}"
    return quoted(loc[-1])


def wrong_value(error: Mapping[str, object], value: Value, loc: Loc) -> tuple[str, str]:
    """Say in plain words what pydantic found wrong with `value`, which stands at `loc`.

    Args:
        error: one record of `ValidationError.errors()`: `type`, `ctx`.
        value: what stands in the file.
        loc: where it stands.

    Returns:
        The message and the hint.
    """
    kind, context = str(error["type"]), error.get("ctx")
    facts = context if isinstance(context, dict) else {}
    if loc == ("version",):
        return f"{label(loc)} must be the number 1, got {described(value)}", "this is the only version of the format"
    if kind in _KINDS:
        return _wrong_kind(kind, value, loc)
    if kind == "literal_error":
        words = [word.strip("' ") for word in str(facts["expected"]).replace(" or ", ", ").split(", ")]
        return _wrong_word(words, value, loc)
    if kind == "too_short":
        return f"{label(loc)} is empty", _EMPTY.get(str(loc[-1]), "name at least one")
    if kind == "string_pattern_mismatch":
        wanted = PATTERNS[str(facts["pattern"])]
        if isinstance(value.data, str) and not value.data.strip():
            return f"{label(loc)} is empty", f"write {wanted}"
    else:
        wanted = _BOUNDS.get(kind, "something else").format(**facts)
    return f"{label(loc)} must be {wanted}, got {described(value)}", ""


def _wrong_kind(kind: str, value: Value, loc: Loc) -> tuple[str, str]:
    """The wrong type. The hint says how to write it when only the quotes or a dash are wrong."""
    expected, hint = _KINDS[kind], ""
    if kind.startswith("model") and (loc[-1:] == ("base",) or loc[:-1] == ("adapters",)):
        expected = "text (a directory or a Hub id) or a mapping"
    elif kind.startswith("model") and loc[-2:-1] == ("checks",):
        expected = "error, warning or off, or a mapping with severity and limit"
    elif loc[-1:] == ("dtype",):
        expected = "a dtype or a list of dtypes"
    if kind == "string_type" and isinstance(value.data, int | float):
        hint = f'put it in quotes: "{value.raw[:SHOWN]}"'
    elif kind in {"int_type", "float_type", "bool_type"} and isinstance(value.data, str):
        hint = "YAML reads what stands in quotes as text: write it without quotes"
    elif kind == "list_type" and isinstance(value.data, str):
        hint = f'put it in a list: "- {quoted(value.data)[1:-1]}"'
    return f"{label(loc)} must be {expected}, got {described(value)}", hint


def _wrong_word(words: list[str], value: Value, loc: Loc) -> tuple[str, str]:
    hint = nearest(value.data, words) if isinstance(value.data, str) else ""
    return f"{label(loc)} must be one of {', '.join(words)}; got {described(value)}", hint
