"""Writes a first configuration file for the adapters found in some directories.

If a training run has a final adapter, its checkpoints are not listed. A base that is missing from the path that its
adapters name is searched for near them.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from merge_gate._internal.errors import UsageError
from merge_gate._internal.text import counted, listing, quoted, without_credentials
from merge_gate.config.from_arguments import current_directory_gone, distinguishing_names
from merge_gate.names.hub_names import could_be_hub_id
from merge_gate.records.files import CONFIG_NAME

MAX_DEPTH = 4
"""How far below a directory `first_config` looks for adapters."""

_MOST_DIRECTORIES = 2_000
"""So many directories are searched for bases that fit."""

_CHECKPOINT = re.compile(r"(?:checkpoint|step|epoch|iter|global_step)[-_]?(\d{1,18})", re.ASCII)
_MODEL_WEIGHTS = re.compile(r".*\.(?:safetensors|bin)(?:\.index\.json)?", re.ASCII)
_UNQUOTED = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*/[A-Za-z0-9_./@+=-]*[A-Za-z0-9_-]|/[A-Za-z0-9_./@+=-]+", re.ASCII)
"""Paths and Hub ids that need no quotes in YAML."""


def first_config(
    directories: Sequence[str],
    base_of: Callable[[str], str | None],
    digest_of: Callable[[str], str] | None = None,
    fits: Callable[[str, str], bool] = lambda _adapter, _base: False,
) -> str:
    """Return a commented configuration of the adapters in and below these directories.

    Args:
        directories: the directories to search.
        base_of: returns the base that the adapter in a directory names, or None.
        digest_of: returns the digest of the base in a directory, to pin it; None pins nothing.
        fits: whether the adapter in a directory may belong to the base in another, by their headers.

    Raises:
        UsageError: a directory does not exist, or no adapter was found.
    """
    adapters, models, unreadable = _search(directories)
    if not adapters:
        places = f"in {listing(map(quoted, directories))} or up to {MAX_DEPTH} levels below"
        closed = f": {listing(map(quoted, unreadable))} cannot be read" if unreadable else ""
        hint = "name readable directories that save_pretrained wrote, or a directory above them"
        raise UsageError(f"no {CONFIG_NAME} found {places}{closed}", hint=hint)
    listed, earlier = _without_checkpoints(adapters)
    bases = {place: _locate_base(name, place, models) for place in listed if (name := base_of(place))}
    bases, offers = _with_fitting(bases, models, fits)
    common = set(bases.values())
    here = [path for _, path in common if path is not None and os.path.isdir(path)]  # noqa: PTH112 (as above)
    digests = {path: digest_of(path) for path in here} if digest_of is not None else {}
    lines = [*_head(bases, digests, offers), *_entries(listed, bases if len(common) > 1 else {}, digests, offers)]
    return "\n".join([*lines, *_not_listed(earlier, unreadable), *_foot()]) + "\n"


# --- searching -----------------------------------------------------------------------------------------------------


def _search(directories: Sequence[str]) -> tuple[set[str], set[str], list[str]]:
    """The adapters and models in and below directories, and what cannot be read. Hidden directories are caches."""
    adapters, models, unreadable = set[str](), set[str](), dict[str, None]()

    def on_error(error: OSError) -> None:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            message = f"{quoted(error.filename)} cannot be searched: {error.strerror}"
            raise UsageError(message, hint="name a directory with adapters")
        unreadable[error.filename] = None

    for top in map(Path, directories):
        for place, inner, files in os.walk(top, onerror=on_error):
            deep = len(Path(place).relative_to(top).parts) >= MAX_DEPTH
            inner[:] = [] if deep else [name for name in inner if not name.startswith(".")]
            if CONFIG_NAME in files:
                adapters.add(_path_for_config(place))
            elif "config.json" in files and any(map(_MODEL_WEIGHTS.fullmatch, files)):
                models.add(_path_for_config(place))
    return adapters, models, list(unreadable)


def _path_for_config(place: str) -> str:
    """A directory relative to the current one; absolute if it was named so and lies outside of the current one."""
    try:
        from_here = os.path.relpath(place)
    except FileNotFoundError:
        raise current_directory_gone() from None
    if from_here.startswith("..") and Path(place).is_absolute():
        return os.path.normpath(place)
    return from_here if from_here in {".", ".."} or from_here.startswith("../") else f"./{from_here}"


def _without_checkpoints(adapters: set[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the adapters to list, and the names of the checkpoints left out by run.

    The last checkpoint of a run is listed if the run has no final adapter.
    """
    checkpoints: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)
    listed = []
    for place in adapters:
        run, name = os.path.split(place)
        if step := _CHECKPOINT.fullmatch(name):
            checkpoints[run].append((int(step[1]), place))
        else:
            listed.append(place)
    left_out = {}
    for run, places in sorted(checkpoints.items()):
        in_order = [place for _, place in sorted(places)]
        if run not in adapters:
            listed.append(in_order.pop())
        if in_order:
            left_out[run] = [os.path.basename(place) for place in in_order]  # noqa: PTH119
    return sorted(listed), left_out


_Base = tuple[str, str | None]
"""A base as adapters name it; and a directory or Hub id that exists, or None if no base of that name was found."""


def _locate_base(name: str, adapter: str, models: set[str]) -> _Base:
    """Find the base that an adapter names. A Hub id is taken as it is; a path may be that of another machine."""
    if could_be_hub_id(name, is_base=True) or os.path.isdir(os.path.expanduser(name)):  # noqa: PTH111, PTH112 (as above)
        return name, name
    if not Path(name).is_absolute():
        for above in Path(adapter).parents:
            if os.path.isdir(above / name):  # noqa: PTH112 (as above)
                return name, _path_for_config(str(above / name))
    same_name = [model for model in models if Path(model).name == Path(name).name]
    return name, same_name[0] if len(same_name) == 1 else None


def _with_fitting(
    bases: Mapping[str, _Base], models: set[str], fits: Callable[[str, str], bool]
) -> tuple[dict[str, _Base], dict[str, list[str]]]:
    """The bases, with the only directory that fits in the place of one that was not found, and all that fit.

    All adapters that name one base must fit. The current directory is searched, too.
    """
    missing: defaultdict[str, list[str]] = defaultdict(list)
    for place, (name, path) in bases.items():
        if path is None:
            missing[name].append(place)
    places = sorted(models | _models_near()) if missing else []
    offers = {
        name: [model for model in places if all(fits(adapter, model) for adapter in adapters)]
        for name, adapters in missing.items()
    }
    only = {name: fitting[0] for name, fitting in offers.items() if len(fitting) == 1}
    return {place: (name, path or only.get(name)) for place, (name, path) in bases.items()}, offers


def _models_near() -> set[str]:
    """The models in and below the current directory, as far as it is small."""
    models: set[str] = set()
    for visited, (place, inner, files) in enumerate(os.walk(".")):
        if visited == _MOST_DIRECTORIES:
            break
        deep = len(Path(place).parts) >= MAX_DEPTH
        inner[:] = [] if deep else sorted(name for name in inner if not name.startswith("."))
        if "config.json" in files and any(map(_MODEL_WEIGHTS.fullmatch, files)):
            models.add(_path_for_config(place))
    return models


# --- writing -------------------------------------------------------------------------------------------------------


def _head(bases: Mapping[str, _Base], digests: Mapping[str, str], offers: Mapping[str, list[str]]) -> list[str]:
    lines = ["# What to merge and check before a release. Try it: merge-gate run merge-gate.yml", "version: 1", ""]
    common = set(bases.values())
    if not common:
        return [
            *lines,
            "# base:   # no adapter names its base: name it here",
            "#   model: ./path/to/base",
            *_dtype("# "),
        ]
    if len(common) > 1:
        return [*lines, "# Each adapter names its own base.", f"# base: {{{_DTYPES}}}   # {_SERVED}", ""]
    ((named, path),) = common
    comment = "as the adapters name it; a directory or a Hub id"
    if path != named:
        comment = f"the adapters name {quoted(named, 200)}, which does not exist here"
        comment += _to_do(path, offers.get(named, []))
    pin = [f"  sha256: {digest}   # of its weight files"] if (digest := digests.get(path or "")) else []
    return [*lines, "base:", f"  model: {_scalar(path or without_credentials(named))}   # {comment}", *pin, *_dtype("")]


_DTYPES = "dtype: [bfloat16, float16]"
_SERVED = "what you serve in; each is checked (default: as stored)"


def _dtype(comment: str) -> list[str]:
    return [f"{comment}  # {_DTYPES}   # {_SERVED}", ""]


def _to_do(path: str | None, fitting: Sequence[str]) -> str:
    """What to do about a base that does not exist here. `path` is in its place."""
    if path is not None:
        return "; this one fits by its shapes: check that it is the base" if path in fitting else ""
    return ": write the path of the base" + (f", such as {listing(map(_scalar, fitting))}" if fitting else "")


def _entries(
    places: Sequence[str], bases: Mapping[str, _Base], digests: Mapping[str, str], offers: Mapping[str, list[str]]
) -> Iterator[str]:
    """A line for each adapter. `bases` has the bases that entries name themselves."""
    own_names = distinguishing_names(places)
    yield "adapters:"
    for place in places:
        name = own_names.get(place) or _checkpoint_name(place)
        named, path = bases.get(place, ("", None))
        digest = digests.get(path or "")
        is_missing = bool(named) and path is None
        keys = {
            "name": name,
            "path": place,
            "base": without_credentials(named) if is_missing else path if digest or path != named else None,
        }
        given = {key: _scalar(value) for key, value in keys.items() if value}
        if digest:
            given["base"] = f"{{model: {given['base']}, sha256: {digest}}}"
        entry = "{" + ", ".join(f"{key}: {value}" for key, value in given.items()) + "}"
        fitting = offers.get(named, [])
        to_do = _to_do(path, fitting)
        comment = (
            f"   # its base {quoted(named, 200)} does not exist here{to_do}" if is_missing or path in fitting else ""
        )
        yield f"  - {entry if len(given) > 1 else given['path']}{comment}"


def _checkpoint_name(place: str) -> str:
    """Put the run's name before a checkpoint's: `checkpoint-500` alone does not name the adapter."""
    run, name = os.path.split(place)
    return f"{os.path.basename(run)}-{name}" if _CHECKPOINT.fullmatch(name) and run.strip("./") else ""  # noqa: PTH119


def _scalar(text: str) -> str:
    """A text in YAML, quoted if need be. JSON's escapes would write 😀 as two surrogates, which YAML refuses."""
    if _UNQUOTED.fullmatch(text):
        return text
    written = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in written)


def _not_listed(left_out: Mapping[str, list[str]], unreadable: list[str]) -> Iterator[str]:
    for run, names in left_out.items():
        yield f"  # not listed: {counted(len(names), 'earlier checkpoint')} of {quoted(run, 200)} ({listing(names)})"
    if unreadable:
        yield f"  # not searched, cannot be read: {listing(map(quoted, unreadable))}"


def _foot() -> list[str]:
    return [
        "",
        "# checks:                # severities and limits; `merge-gate explain` lists them",
        "#   rounding-loss: error",
        "# allow-pickle: true     # only if you trust the authors of the .bin files",
    ]
