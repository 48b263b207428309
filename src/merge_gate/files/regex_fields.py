"""Lists the regular expressions that PEFT makes of an adapter_config.json, each with its place.

The parsed file is hostile. This module compiles expressions and never matches them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from merge_gate.records.files import Pattern

_WHOLE_NAMES = ("target_modules", "exclude_modules", "feedforward_modules")
"""In these keys a string is an expression for whole names; a list holds plain names (peft/tuners/tuners_utils.py)."""

_PLAIN_NAME = re.compile(r"\^?(?:[A-Za-z0-9_-]|\.|\\\.)+\$?")
"""Names that are valid and fast to match. A config may hold a hundred thousand of them."""

MAX_CHARACTERS = 100_000
"""Longer than any expression that people or PEFT write. Python takes seconds to compile one of this length."""


def patterns_of(config: Mapping[str, Any]) -> Iterator[Pattern]:
    """Every expression of a config that is more than a name, in the order of its keys. Other types are ignored."""
    return (pattern for pattern in _every_pattern(config) if not _PLAIN_NAME.fullmatch(pattern.text))


def _every_pattern(config: Mapping[str, Any]) -> Iterator[Pattern]:
    for key, value in config.items():
        if key in _WHOLE_NAMES and isinstance(value, str):
            yield Pattern(place=key, text=value, expression=value)
        elif key == "layers_pattern":
            for text in [value] if isinstance(value, str) else value if isinstance(value, list) else []:
                if isinstance(text, str):
                    yield Pattern(place=key, text=text, expression=rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\.")
        elif key.endswith("_pattern") and isinstance(value, dict):
            for text in value:
                yield Pattern(place=f"a key of {key}", text=text, expression=rf"(.*\.)?({text})$")


def problem(pattern: Pattern) -> str | None:
    """Why the expression is refused; None if it is accepted."""
    if len(pattern.text) > MAX_CHARACTERS:
        return f"it has {len(pattern.text):,} characters, expected at most {MAX_CHARACTERS:,}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern.expression)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return None
