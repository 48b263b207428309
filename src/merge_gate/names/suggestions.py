"""Suggests the known word closest to a mistyped one, or what another tool's word is called here."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from merge_gate._internal.text import quoted

MAX_COMPARED = 200

_OTHER_NAMES = {
    "fp16": "float16", "f16": "float16", "half": "float16", "torch.float16": "float16",
    "fp32": "float32", "f32": "float32", "float": "float32", "full": "float32", "torch.float32": "float32",
    "torch.bfloat16": "bfloat16", "fp8": "bfloat16", "float8": "bfloat16", "float8_e4m3fn": "bfloat16",
    "8bit": "bnb-8bit", "int8": "bnb-8bit", "4bit": "bnb-4bit", "nf4": "bnb-4bit",
    "warn": "warning", "err": "error", "fail": "error", "ignore": "off", "skip": "off", "disabled": "off",
}  # fmt: skip


def nearest(word: str, known: Iterable[str], *, before: str = "") -> str:
    """Return `did you mean "x"?` with the known word closest to `word`; empty if no known word is close.

    `before` is put in front of the known word: the part of a path that was correct.
    """
    near = closest(word, known)
    return f"did you mean {quoted(before + near)}?" if near else ""


def closest(word: str, known: Iterable[str], most: int = MAX_COMPARED, likeness: float = 0.6) -> str:
    """Return the known word closest to `word`; empty if none of the first `most` known words is this close."""
    candidates = list(known)[:most]
    if len(word) > MAX_COMPARED:
        return ""
    plain = {candidate.lower().replace("_", "-"): candidate for candidate in candidates}
    other = _OTHER_NAMES.get(word.lower(), "")
    close = [other] if other in plain else get_close_matches(word.lower().replace("_", "-"), plain, 1, likeness)
    return plain[close[0]] if close else ""
