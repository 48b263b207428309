"""What an adapter_config.json holds that PEFT reads as regular expressions.

In: the parsed file, which is hostile. Out: each expression as PEFT forms it, and where it stands. Matches nothing.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from merge_gate.records.files import Pattern

_WHOLE_NAMES = ("target_modules", "exclude_modules", "feedforward_modules")
"""A string here is an expression for whole names; a list holds plain ones (peft/tuners/tuners_utils.py)."""

_PLAIN_NAME = re.compile(r"\^?(?:[A-Za-z0-9_-]|\.|\\\.)+\$?")
"""Valid, and quick to match: a config may hold a hundred thousand of these."""

MOST_CHARACTERS = 100_000
"""No expression that people or PEFT write is longer; Python takes seconds to compile one."""


def patterns_of(config: Mapping[str, Any]) -> Iterator[Pattern]:
    """Every expression of a config that is more than a name, in the order of its keys; other types are passed over."""
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
    """Why the expression is not taken; None where it is."""
    if len(pattern.text) > MOST_CHARACTERS:
        return f"it has {len(pattern.text):,} characters, expected at most {MOST_CHARACTERS:,}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern.expression)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return None
