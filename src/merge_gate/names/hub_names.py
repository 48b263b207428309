"""Decides whether the name of an adapter or a model is a Hub id, or a mistyped directory.

In: a name as a user or an adapter wrote it, and the directory that relative paths start at. Out: what it may be. It
lists directories and uses no network: a name that could be a directory's must not reach the Hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from merge_gate._internal.text import COMMIT
from merge_gate.names.suggestions import closest
from merge_gate.records.files import CONFIG_NAME

HUB = "hub:"
"""Put before an id to say that the Hub is meant."""

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?!.*(?:--|\.\.|\.git$))(?:{_PART}/)?{_PART}")
_IN_CACHE = re.compile(r"(?:^|/)models--([^/]+)/snapshots(?:/|$)")
_MOST_ENTRIES = 100_000
_CLOSER = 0.7
"""`acme` is a little like `cache`, and both are common."""


def could_be_hub_id(name: str, *, is_base: bool) -> bool:
    """Whether a name is spelled like a Hub id. That of a base may be bare (`gpt2`)."""
    return bool(_HUB_ID.fullmatch(name)) and ("/" in name or is_base)


def hub_name(name: str) -> str | None:
    """The Hub id that a base's name is, or that a path in a cache of the Hub has; None for any other path."""
    if match := _IN_CACHE.search(name):
        name = match[1].replace("--", "/", 1)
    return name if could_be_hub_id(name, is_base=True) else None


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a full commit. A branch or a tag may move."""
    return revision is not None and bool(COMMIT.fullmatch(revision))


def close_directory(name: str, directory: str | Path, *, is_base: bool) -> str:
    """The file or directory that a Hub id was probably meant to be; empty if none is close.

    1. Its first part is close to a directory here, and the rest to a name in there: `adaptors/x` means `adapters/x`. If
       nothing in there is close to `x`, the first part must be closer, and the answer is `adapters/` if it holds
       adapters (for a base: models; without a typo: any). An owner of bases may differ in case alone: `Qwen`.
    2. All of it is close to a model or an adapter here, or to a directory of them.
    3. Its last part is one, here or one level deeper, or all of it exists one level deeper or in a directory above.
    """
    place = Path(directory)
    names, (first, _, rest) = _entries(place), name.partition("/")
    if rest and (near := closest(first, names, _MOST_ENTRIES)):
        inside = [entry for entry in _entries(place / near) if not is_base or _may_be_base(place / near / entry)]
        inner = closest(rest, inside, _MOST_ENTRIES)
        is_owner = is_base and near != first and near.lower() == first.lower()
        is_closer = not is_owner and closest(first, [near], likeness=_CLOSER)
        kinds = {is_base} if near != first else {True, False}
        if inner or (is_closer and any(_leads(place / near, is_base=kind) for kind in kinds)):
            return f"{near}/{inner}"
    near = closest(name, names, _MOST_ENTRIES, _CLOSER)
    if near and _leads(place / near, is_base=is_base):
        return near
    above = ("../" * level + name for level, outer in enumerate(place.absolute().parents, 1) if (outer / name).is_dir())
    return next(_same_end(name, place, names, is_base=is_base), "") or next(above, "")


def _same_end(name: str, place: Path, names: list[str], *, is_base: bool) -> Iterator[str]:
    """The paths here that end as `name`: models for a base, adapters for an adapter, and directories of them here."""
    last = name.rpartition("/")[2].lower()
    yield from (entry for entry in names if entry.lower() == last and _leads(place / entry, is_base=is_base))
    for outer in names:
        for inner in [name, *_entries(place / outer)]:
            if inner.lower() in {last, name.lower()} and _fits(place / outer / inner, is_base=is_base):
                yield f"{outer}/{inner}"


def _entries(directory: Path) -> list[str]:
    """The names in a directory, without hidden ones; empty if it cannot be listed."""
    try:
        return sorted(name for name in os.listdir(directory) if not name.startswith("."))  # noqa: PTH208 (names are all that is wanted)
    except OSError:
        return []


def _fits(directory: Path, *, is_base: bool) -> bool:
    return os.path.isfile(directory / ("config.json" if is_base else CONFIG_NAME))  # noqa: PTH113 (False where pathlib raises)


def _leads(directory: Path, *, is_base: bool) -> bool:
    """Whether a directory is a model or an adapter, or holds some."""
    return any(_fits(name, is_base=is_base) for name in (directory, *map(directory.joinpath, _entries(directory))))


def _may_be_base(directory: Path) -> bool:
    """Many adapters are named after their base."""
    return _fits(directory, is_base=True) or not _fits(directory, is_base=False)
