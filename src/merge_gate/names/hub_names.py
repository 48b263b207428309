"""Decides whether the name of an adapter or a model is a Hub id, or a mistyped directory.

In: a name as a user or an adapter wrote it, and the directory that relative paths start at. Out: what it may be. It
lists directories and uses no network: a name that could be a directory's must not reach the Hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from merge_gate.names.foreign_names import COMMIT
from merge_gate.names.suggestions import closest

HUB = "hub:"
"""Put before an id to say that the Hub is meant."""

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?!.*(?:--|\.\.|\.git$))(?:{_PART}/)?{_PART}")
_MOST_ENTRIES = 100_000
_CLOSER = 0.7
"""`acme` is a little like `cache`, and both are common."""


def could_be_hub_id(name: str, *, is_base: bool) -> bool:
    """Whether a name is spelled like a Hub id. That of a base may be bare (`gpt2`)."""
    return bool(_HUB_ID.fullmatch(name)) and ("/" in name or is_base)


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a full commit. A branch or a tag may move."""
    return revision is not None and bool(COMMIT.fullmatch(revision))


def close_directory(name: str, directory: str | Path, *, is_base: bool) -> str:
    """The file or directory that a Hub id was probably meant to be; empty if none is close.

    1. Its first part is close to a directory here, and the rest to a name in there: `adaptors/x` means `adapters/x`. If
       nothing in there is close to `x`, the first part must be closer, and the answer is `adapters/`.
    2. All of it is close to a name in `directory`, or its last part is one. A base is no adapter.
    3. It exists one level deeper, as a model or an adapter, or in a directory above `directory`.
    """
    place = Path(directory)
    names, (first, _, rest) = _entries(place), name.partition("/")
    if rest and (near := closest(first, names, _MOST_ENTRIES)):
        inner = closest(rest, _entries(place / near), _MOST_ENTRIES)
        if inner or closest(first, [near], likeness=_CLOSER):
            return f"{near}/{inner}"
    near = closest(name, names, _MOST_ENTRIES, _CLOSER) or (rest if rest in names else "")
    is_adapter = (place / near / "adapter_config.json").is_file()
    if near and not (is_base and rest and is_adapter):  # many adapters are named after their base
        return near
    above = ("../" * level + name for level, outer in enumerate(place.absolute().parents, 1) if (outer / name).is_dir())
    return next(_deeper(name, place, names), "") or next(above, "")


def _deeper(name: str, place: Path, names: list[str]) -> Iterator[str]:
    for outer in names:
        for inner in [name] if "/" in name else _entries(place / outer):
            if inner.lower() == name.lower() and _holds_model(place / outer / inner):
                yield f"{outer}/{inner}"


def _entries(directory: Path) -> list[str]:
    """The names in a directory, without hidden ones; empty if it cannot be listed."""
    try:
        return sorted(name for name in os.listdir(directory) if not name.startswith("."))  # noqa: PTH208 (names are all that is wanted)
    except OSError:
        return []


def _holds_model(directory: Path) -> bool:
    return any(os.path.isfile(directory / name) for name in ("config.json", "adapter_config.json"))  # noqa: PTH113 (False where pathlib raises)
