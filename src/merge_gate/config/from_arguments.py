"""Builds a `Config` from adapters named on the command line.

Directories, globs, Hub ids, or changed files of adapters (as a git hook passes them) go in. The result is the same
`Config` that a file with these entries gives, built by the same code.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

from merge_gate._internal.errors import ConfigError, UsageError
from merge_gate._internal.text import listing, quoted, unusable
from merge_gate.judging import foreign_formats
from merge_gate.names.hub_names import HUB
from merge_gate.records.config import COMMAND_LINE, Config
from merge_gate.records.files import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME

_NOT_CONFIGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".zip", ".tar", ".gz", ".tgz", ".zst")
"""Suffixes of weights and archives."""


def names_a_file(names: Sequence[str]) -> bool:
    """Say whether the single name is a configuration file, existing or not. Otherwise the names are adapters.

    Raises:
        UsageError: a configuration file is mixed with other arguments, or a text can be no name.
    """
    if why := next(filter(None, map(unusable, names)), ""):
        raise UsageError(f"a name {why}")
    others = [name for name in names if _adapter_directory(name) == name and not name.startswith(HUB)]
    files = [  # a pipe or a device is one, too
        name
        for name in others
        if not os.path.isdir(name) and (name.endswith((".yml", ".yaml")) or os.path.exists(name))  # noqa: PTH110, PTH112 (False where pathlib raises)
    ]
    if files and len(names) > 1:
        raise UsageError(
            f"{quoted(files[0])} is a file among other arguments",
            hint="give one configuration file, or adapters (directories, globs, Hub ids), but not both",
        )
    if files and files[0].endswith(_NOT_CONFIGS):
        raise UsageError(
            f"{quoted(files[0])} is not a configuration file or a directory",
            hint=foreign_formats.by_files((Path(files[0]).name,))
            or "name the adapter's directory, which holds adapter_config.json (unpack an archive first)",
        )
    return bool(files)


def _adapter_directory(name: str) -> str:
    """The directory of an adapter's own file. Any other name is returned unchanged."""
    is_its_file = Path(name).name in (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME) and os.path.isfile(name)  # noqa: PTH113 (as below)
    return str(Path(name).parent) if is_its_file else name


def _without_files(names: Sequence[str]) -> list[str]:
    """The names, with all files of an adapter replaced by one mention of its directory."""
    places: list[str] = []
    for name in names:
        place = _adapter_directory(name)
        if place == name or place not in places:
            places.append(place)
    return places


def distinguishing_names(directories: Sequence[str]) -> dict[str, str]:
    """Names for directories that share their last part: the fewest last parts that make each name unique."""
    parts_of = {directory: Path(directory).parts for directory in directories}
    deepest = max(map(len, parts_of.values()), default=0)
    counts = [Counter(parts[-depth:] for parts in parts_of.values()) for depth in range(1, deepest + 1)]
    names = {}
    for directory, parts in parts_of.items():
        unique = (depth for depth in range(1, len(parts) + 1) if counts[depth - 1][parts[-depth:]] == 1)
        if (depth := next(unique, 1)) > 1:
            names[directory] = "-".join(parts[-depth:])
    return names


def config_of(
    names: Sequence[str],
    *,
    base: str | None = None,
    dtypes: Sequence[str] = (),
    quantization: str | None = None,
    revision: str | None = None,
    checks: Mapping[str, object] = MappingProxyType({}),
    expect: Mapping[str, object] = MappingProxyType({}),
    allow_pickle: bool = False,
    output: str | None = None,
    policy: str | None = None,
) -> Config:
    """Build the configuration that lists these adapters. Relative names start in the current directory.

    Args:
        names: directories, globs or Hub ids. Files of an adapter count as its directory.
        base: a directory or a Hub id. If None, each adapter's adapter_config.json names its base.
        dtypes: `auto` or names of dtypes. Each is checked.
        quantization: a word of `Quantization`.
        revision: a commit, tag or branch of the adapters, if they are on the Hub.
        checks: severities, or mappings with severity and limit, by the ids of checks, as a file has them.
        expect: facts that every adapter must match, as a file has them; and `base-sha256`, the digest of the base.
        allow_pickle: load pickled weights, with weights_only.
        output: the output directory of the run, which globs skip.
        policy: the name of a policy.

    Raises:
        UsageError: with every problem.
    """
    from merge_gate.config.build import build_config  # noqa: PLC0415 (imports pydantic)
    from merge_gate.config.yaml_document import document_of  # noqa: PLC0415 (imports yaml)

    places = _without_files(names)
    for place in places:
        _refuse_parent_directory(place)
    own_names = distinguishing_names([place for place in places if os.path.isdir(place)])  # noqa: PTH112 (as above)
    expect = dict(expect)
    digest = expect.pop("base-sha256", None)
    options = {"model": base, "dtype": dtypes, "quantization": quantization, "sha256": digest}
    facts = {"revision": revision, "expect": expect}
    file = {
        "version": 1,
        "adapters": [
            _given({"path": _as_utf8(place), "name": _as_utf8(own_names.get(place, "")) or None, **facts})
            for place in places
        ],
        **_given({"base": _given(options), "checks": checks}),
        **({} if allow_pickle is False else {"allow-pickle": allow_pickle}),
    }
    written = json.dumps(file)
    digest = hashlib.sha256(written.encode()).hexdigest()
    try:
        document = document_of(json.loads(written), COMMAND_LINE)
        return build_config(document, digest, path=None, directory=Path.cwd(), output=output, policy=policy)
    except FileNotFoundError:
        raise current_directory_gone() from None
    except ConfigError as error:
        problems = dict.fromkeys(f"{row.message} ({row.hint})" if row.hint else row.message for row in error.problems)
        raise UsageError("; ".join([*problems, *([f"and {error.more:,} more"] if error.more else [])])) from None


def _given(keys: Mapping[str, object]) -> dict[str, object]:
    """The keys that have a value."""
    return {key: value for key, value in keys.items() if value not in (None, (), [], {})}


def current_directory_gone() -> UsageError:
    """The error for relative names in a current directory that has been removed."""
    return UsageError("the current directory no longer exists", hint="change to an existing directory")


def _as_utf8(name: str) -> str:
    """Decode a file name's bytes as UTF-8, whatever the locale is."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def _refuse_parent_directory(name: str) -> None:
    """Refuse a directory that holds adapters and is not an adapter itself."""
    if os.path.isdir(name) and not _has_config(name):  # noqa: PTH112 (as above)
        inside: list[str] = []
        with suppress(OSError):  # unreadable: the preflight reports it
            inside += sorted(entry.name for entry in os.scandir(name) if _has_config(entry.path))
        if inside:
            raise UsageError(
                f"the directory {quoted(name)} is not an adapter, but holds adapters: {listing(map(quoted, inside))}",
                hint=f"name one of them, or all of them: {quoted(f'{name.rstrip(os.sep)}/*')}",
            )


def _has_config(directory: str) -> bool:
    return os.path.exists(os.path.join(directory, CONFIG_NAME))  # noqa: PTH110, PTH118 (as above)
