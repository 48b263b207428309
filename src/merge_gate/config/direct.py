"""Adapters named on the command line → `Config`, without a file; and a first file, written from what lies there.

In: names as a shell gives them: directories, globs, Hub ids, or files of adapters, as a hook of git names what was
changed. Out: the `Config` that a file with these entries gives, or the text of such a file. Built by the same code as a
file's, so that both are judged alike.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from merge_gate.errors import ConfigError, UsageError
from merge_gate.records.config import COMMAND_LINE, Config
from merge_gate.records.files import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME
from merge_gate.text import listing, quoted

MAX_DEPTH = 3
"""How far below a directory `first_config` looks for adapters."""


def names_a_file(names: Sequence[str]) -> bool:
    """Whether the one name is a configuration file, there or not; otherwise the names are adapters.

    Raises:
        UsageError: a configuration file among adapters.
    """
    others = [name for name in names if _directory_of(name) == name]
    files = [name for name in others if name.endswith((".yml", ".yaml")) or _is_no_directory(name)]
    if files and len(names) > 1:
        raise UsageError(
            f"{quoted(files[0])} is a file among other arguments",
            hint="give one configuration file, or adapters (directories, globs, Hub ids), not both",
        )
    return bool(files)


def _is_no_directory(name: str) -> bool:
    """Whether something stands there that is no directory: a file, a pipe, a device."""
    return os.path.exists(name) and not os.path.isdir(name)  # noqa: PTH110, PTH112 (False where pathlib raises)


def _directory_of(name: str) -> str:
    """Where an adapter's own file stands; every other name is what it is."""
    is_its_file = Path(name).name in (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME) and os.path.isfile(name)  # noqa: PTH113 (as below)
    return str(Path(name).parent) if is_its_file else name


def _places(names: Sequence[str]) -> list[str]:
    """The names; files of one adapter are its directory, once."""
    found: list[str] = []
    for name in names:
        place = _directory_of(name)
        if place == name or place not in found:
            found.append(place)
    return found


def _longer_names(directories: Sequence[str]) -> dict[str, str]:
    """For directories that share their last part with others: as many of the last parts as tell them apart."""
    parts = {directory: Path(directory).parts for directory in directories}
    deepest = max(map(len, parts.values()), default=0)
    shared = [Counter(one[-depth:] for one in parts.values()) for depth in range(1, deepest + 1)]
    longer = {}
    for directory, one in parts.items():
        own = (depth for depth in range(1, len(one) + 1) if shared[depth - 1][one[-depth:]] == 1)
        if (depth := next(own, 1)) > 1:
            longer[directory] = "-".join(one[-depth:])
    return longer


def config_of(
    names: Sequence[str], *, base: str | None = None, dtypes: Sequence[str] = (), quantization: str | None = None
) -> Config:
    """Build the configuration that lists these adapters. Relative names start in the current directory.

    Args:
        names: directories, globs or Hub ids; files of one adapter, however many, stand for its directory.
        base: a directory or a Hub id; where None, each adapter's own adapter_config.json names it.
        dtypes: `auto` or names of dtypes; each is checked.
        quantization: a word of `Quantization`.

    Raises:
        UsageError: with every problem.
    """
    from merge_gate.config.build import build_config  # noqa: PLC0415 (imports pydantic)
    from merge_gate.config.positions import read_yaml  # noqa: PLC0415 (imports yaml)

    places = _places(names)
    for place in places:
        _refuse_shelf(place)
    longer = _longer_names([place for place in places if os.path.isdir(place)])  # noqa: PTH112 (as above)
    entries = [{"path": place} | ({"name": longer[place]} if place in longer else {}) for place in places]
    wanted = {"model": base, "dtype": list(dtypes), "quantization": quantization}
    file: dict[str, Any] = {"version": 1, "adapters": entries}
    if any(wanted.values()):
        file["base"] = {key: value for key, value in wanted.items() if value}
    text = json.dumps(file, indent=1)  # JSON is YAML
    try:
        return build_config(read_yaml(text, COMMAND_LINE), hashlib.sha256(text.encode()).hexdigest())
    except FileNotFoundError:
        raise UsageError("the current directory is gone", hint="change to one that is there") from None
    except ConfigError as error:
        problems = dict.fromkeys(f"{one.message} ({one.hint})" if one.hint else one.message for one in error.problems)
        raise UsageError("; ".join([*problems, *([f"and {error.more:,} more"] if error.more else [])])) from None


def _refuse_shelf(name: str) -> None:
    """A directory that holds adapters is none itself."""
    if os.path.isdir(name) and not _has_config(name):  # noqa: PTH112 (as above)
        inside: list[str] = []
        with suppress(OSError):  # it may not be read: the preflight says so
            inside += sorted(entry.name for entry in os.scandir(name) if _has_config(entry.path))
        if inside:
            raise UsageError(
                f"the directory {quoted(name)} is no adapter, but holds {listing(map(quoted, inside))}",
                hint=f"name one of them, or all: {quoted(f'{name.rstrip(os.sep)}/*')}",
            )


def _has_config(directory: str) -> bool:
    return os.path.exists(os.path.join(directory, CONFIG_NAME))  # noqa: PTH110, PTH118 (as above)


# --- a first file --------------------------------------------------------------------------------------------------


def first_config(directories: Sequence[str], base_of: Callable[[str], str | None]) -> str:
    """Return a commented configuration of the adapters in and below these directories.

    Args:
        directories: where to look.
        base_of: gives the base that the adapter in a directory names, or None.

    Raises:
        UsageError: a directory does not exist, or no adapter was found.
    """
    closed: dict[str, None] = {}
    found = sorted({place for directory in directories for place in _adapters_in(directory, closed)})
    if not found:
        looked = f"in {listing(map(quoted, directories))}, nor up to {MAX_DEPTH} levels below"
        if closed:
            raise UsageError(
                f"no {CONFIG_NAME} found {looked}: {listing(map(quoted, closed))} cannot be read",
                hint="check that the user who runs the gate may read it",
            )
        raise UsageError(
            f"no {CONFIG_NAME} {looked}", hint="name the directories that save_pretrained wrote, or one above them"
        )
    bases = Counter(named for place in found if (named := base_of(place)))
    return "\n".join([*_head(bases), *_entries(found), *_not_seen(closed), *_foot()]) + "\n"


def _adapters_in(directory: str, closed: dict[str, None]) -> Iterator[str]:
    """The adapters in and below; into `closed` go the directories that cannot be read."""
    top = Path(directory)

    def refused(error: OSError) -> None:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise UsageError(f"no such directory: {quoted(error.filename)}", hint="name a directory with adapters")
        closed[error.filename] = None

    for place, inner, files in os.walk(top, onerror=refused):
        if len(Path(place).relative_to(top).parts) >= MAX_DEPTH:
            inner.clear()
        if CONFIG_NAME in files:
            yield os.path.relpath(place)


def _head(bases: Counter[str]) -> list[str]:
    lines = ["# What to merge and check before a release. Try it: merge-gate run merge-gate.yml", "version: 1", ""]
    if len(bases) == 1:
        (named,) = bases
        return [
            *lines,
            "base:",
            f"  model: {json.dumps(named)}   # as the adapters name it; a directory or a Hub id",
            *_dtype(""),
        ]
    why = "each adapter names its own" if bases else "no adapter names one: name it here"
    return [*lines, f"# base:   # {why}", "#   model: ./path/to/base", *_dtype("# ")]


def _dtype(comment: str) -> list[str]:
    return [f"{comment}  # dtype: [bfloat16, float16]   # what you serve in; each is checked (default: as stored)", ""]


def _entries(found: list[str]) -> list[str]:
    longer = _longer_names(found)
    lines = ["adapters:"]
    for place in found:
        written = json.dumps(place if place.startswith(".") else f"./{place}")
        name = longer.get(place)
        lines.append(f"  - {{name: {json.dumps(name)}, path: {written}}}" if name else f"  - {written}")
    return lines


def _not_seen(closed: Collection[str]) -> list[str]:
    return [f"  # not looked into, cannot be read: {listing(map(quoted, closed))}"] if closed else []


def _foot() -> list[str]:
    return [
        "",
        "# checks:                # severities and limits; docs/checks.md explains each",
        "#   rounding-loss: error",
        "# allow-pickle: true     # only if you trust whoever made the .bin files",
    ]
