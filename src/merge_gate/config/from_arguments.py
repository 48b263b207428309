"""Adapters named on the command line → `Config`, without a file.

In: names as a shell gives them: directories, globs, Hub ids, or files of adapters, as a hook of git names what was
changed. Out: the `Config` that a file with these entries gives. Built by the same code as a file's, so that both are
judged alike.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from merge_gate.errors import ConfigError, UsageError
from merge_gate.records.config import COMMAND_LINE, Config
from merge_gate.records.files import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME
from merge_gate.text import listing, quoted

_NO_CONFIGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".zip", ".tar", ".gz", ".tgz", ".zst")
"""Ends of the names of weights and archives."""


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
    if files and files[0].endswith(_NO_CONFIGS):
        raise UsageError(
            f"{quoted(files[0])} is neither a configuration file nor a directory",
            hint="name the adapter's directory, with adapter_config.json in it (unpacked, where this is an archive)",
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


def longer_names(directories: Sequence[str]) -> dict[str, str]:
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
    from merge_gate.config.yaml_document import read_yaml  # noqa: PLC0415 (imports yaml)

    places = _places(names)
    for place in places:
        _refuse_shelf(place)
    longer = longer_names([place for place in places if os.path.isdir(place)])  # noqa: PTH112 (as above)
    entries = [
        {"path": _letters(place)} | ({"name": _letters(longer[place])} if place in longer else {}) for place in places
    ]
    wanted = {"model": base, "dtype": list(dtypes), "quantization": quantization}
    file: dict[str, Any] = {"version": 1, "adapters": entries}
    if any(wanted.values()):
        file["base"] = {key: value for key, value in wanted.items() if value}
    text = yaml_text(file, indent=1)
    try:
        document, digest = read_yaml(text, COMMAND_LINE), hashlib.sha256(text.encode()).hexdigest()
        return build_config(document, digest, path=None, directory=Path.cwd())
    except FileNotFoundError:
        raise nowhere() from None
    except ConfigError as error:
        problems = dict.fromkeys(f"{one.message} ({one.hint})" if one.hint else one.message for one in error.problems)
        raise UsageError("; ".join([*problems, *([f"and {error.more:,} more"] if error.more else [])])) from None


def nowhere() -> UsageError:
    """What is said where relative names start in a directory that somebody has removed."""
    return UsageError("the current directory is gone", hint="change to one that is there")


def _letters(name: str) -> str:
    """A name as a file in UTF-8 has it, whatever the locale made of its bytes."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def yaml_text(data: object, indent: int | None = None) -> str:
    """As YAML on one line, or indented: JSON, but that letters stay letters, and what is no letter has one escape.

    JSON writes 😀 as a pair of surrogates, which YAML reads as two characters that are none.
    """
    written = json.dumps(data, indent=indent, ensure_ascii=False)
    return "".join(c if c.isprintable() or c == "\n" else f"\\U{ord(c):08x}" for c in written)


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
