"""What lies on disk → a first configuration file, as a person would write it.

In: directories, and what gives the base that an adapter names. Out: the text of a file. Of a training run it lists the
adapter, not its checkpoints; a base that is not where the adapters name it is looked for beside them.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from merge_gate.config.from_arguments import longer_names, nowhere, yaml_text
from merge_gate.config.paths import could_be_hub_id
from merge_gate.errors import UsageError
from merge_gate.records.files import CONFIG_NAME
from merge_gate.text import counted, listing, quoted

MAX_DEPTH = 4
"""How far below a directory `first_config` looks for adapters."""

_STEP = re.compile(r"(?:checkpoint|step|epoch|iter|global_step)[-_]?(\d{1,18})", re.ASCII)
_MODEL = re.compile(r".*\.(?:safetensors|bin)(?:\.index\.json)?", re.ASCII)
_PLAIN = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*/[A-Za-z0-9_./@+=-]*[A-Za-z0-9_-]|/[A-Za-z0-9_./@+=-]+", re.ASCII)
"""Paths and Hub ids that are text in YAML without quotes."""


@dataclass(slots=True)
class _Lying:
    """What was found below the directories that were named."""

    adapters: set[str] = field(default_factory=set)
    models: set[str] = field(default_factory=set)
    closed: dict[str, None] = field(default_factory=dict)
    """Directories that cannot be read, in the order in which they were found."""


def first_config(directories: Sequence[str], base_of: Callable[[str], str | None]) -> str:
    """Return a commented configuration of the adapters in and below these directories.

    Args:
        directories: where to look.
        base_of: gives the base that the adapter in a directory names, or None.

    Raises:
        UsageError: a directory does not exist, or no adapter was found.
    """
    lying = _Lying()
    for directory in directories:
        _look(directory, lying)
    if not lying.adapters:
        looked = f"in {listing(map(quoted, directories))}, nor up to {MAX_DEPTH} levels below"
        if lying.closed:
            raise UsageError(
                f"no {CONFIG_NAME} found {looked}: {listing(map(quoted, lying.closed))} cannot be read",
                hint="check that the user who runs the gate may read it",
            )
        raise UsageError(
            f"no {CONFIG_NAME} {looked}", hint="name the directories that save_pretrained wrote, or one above them"
        )
    listed, left_out = _releases(lying.adapters)
    bases = {place: _base(named, place, lying.models) for place in listed if (named := base_of(place))}
    common = {(base.named, base.found) for base in bases.values()}
    lines = [*_head(bases), *_entries(listed, bases if len(common) > 1 else {})]
    return "\n".join([*lines, *_not_listed(left_out, lying), *_foot()]) + "\n"


# --- looking -------------------------------------------------------------------------------------------------------


def _look(directory: str, lying: _Lying) -> None:
    """Note the adapters and the models in and below, but for hidden directories: caches, not releases."""
    top = Path(directory)

    def refused(error: OSError) -> None:
        if isinstance(error, NotADirectoryError) and os.path.exists(error.filename):  # noqa: PTH110 (False, where pathlib raises)
            raise UsageError(f"{quoted(error.filename)} is a file, expected a directory", hint=_NAME_ONE)
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise UsageError(f"no such directory: {quoted(error.filename)}", hint=_NAME_ONE)
        lying.closed[error.filename] = None

    for place, inner, files in os.walk(top, onerror=refused):
        deep = len(Path(place).relative_to(top).parts) >= MAX_DEPTH
        inner[:] = [] if deep else [name for name in inner if not name.startswith(".")]
        if CONFIG_NAME in files:
            lying.adapters.add(_written(place))
        elif "config.json" in files and any(map(_MODEL.fullmatch, files)):
            lying.models.add(_written(place))


_NAME_ONE = "name a directory with adapters"


def _written(place: str) -> str:
    """A directory as it stands in the file: from here, or whole where it was named so and is elsewhere."""
    try:
        from_here = os.path.relpath(place)
    except FileNotFoundError:
        raise nowhere() from None
    if from_here.startswith("..") and Path(place).is_absolute():
        return os.path.normpath(place)
    return from_here if from_here in {".", ".."} or from_here.startswith("../") else f"./{from_here}"


def _releases(adapters: set[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The adapters, of a run's checkpoints only the last and that only where the run has no adapter; and the others."""
    steps: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)
    listed = []
    for place in adapters:
        run, name = os.path.split(place)
        if step := _STEP.fullmatch(name):
            steps[run].append((int(step[1]), place))
        else:
            listed.append(place)
    left_out = {}
    for run, places in sorted(steps.items()):
        in_order = [place for _, place in sorted(places)]
        if run not in adapters:
            listed.append(in_order.pop())
        if in_order:
            left_out[run] = [os.path.basename(place) for place in in_order]  # noqa: PTH119
    return sorted(listed), left_out


@dataclass(frozen=True, slots=True)
class _Base:
    named: str
    found: str | None
    """Where it is; None where nothing of that name was found."""


def _base(named: str, adapter: str, models: set[str]) -> _Base:
    """The base as the file has to name it. One on the Hub is there; a path may have been another machine's."""
    if could_be_hub_id(named, is_base=True) or os.path.isdir(os.path.expanduser(named)):  # noqa: PTH111, PTH112 (as above)
        return _Base(named, named)
    if not Path(named).is_absolute():
        for above in Path(adapter).parents:
            if os.path.isdir(above / named):  # noqa: PTH112 (as above)
                return _Base(named, _written(str(above / named)))
    of_that_name = [model for model in models if Path(model).name == Path(named).name]
    return _Base(named, of_that_name[0] if len(of_that_name) == 1 else None)


# --- writing -------------------------------------------------------------------------------------------------------


def _head(bases: Mapping[str, _Base]) -> list[str]:
    lines = ["# What to merge and check before a release. Try it: merge-gate run merge-gate.yml", "version: 1", ""]
    common = {(base.named, base.found) for base in bases.values()}
    if len(common) != 1:
        why = "each adapter names its own" if bases else "no adapter names one: name it here"
        return [*lines, f"# base:   # {why}", "#   model: ./path/to/base", *_dtype("# ")]
    ((named, found),) = common
    said = "as the adapters name it; a directory or a Hub id"
    if found != named:
        said = f"the adapters name {quoted(named, 200)}"
        said += ", which is not there from here" if found else ": it is not there from here, so write where it is"
    return [*lines, "base:", f"  model: {_scalar(found or named)}   # {said}", *_dtype("")]


def _dtype(comment: str) -> list[str]:
    return [f"{comment}  # dtype: [bfloat16, float16]   # what you serve in; each is checked (default: as stored)", ""]


def _entries(places: Sequence[str], bases: Mapping[str, _Base]) -> Iterator[str]:
    """A line for each adapter; `bases` are those that the entries have to name for themselves."""
    longer = longer_names(places)
    yield "adapters:"
    for place in places:
        name = longer.get(place) or _name_of_a_checkpoint(place)
        base = bases.get(place)
        keys = {"name": name, "path": place, "base": base.found if base and base.found != base.named else None}
        given = {key: _scalar(value) for key, value in keys.items() if value}
        entry = "{" + ", ".join(f"{key}: {value}" for key, value in given.items()) + "}"
        missing = base is not None and base.found is None
        comment = f"   # its base {quoted(base.named, 200)} is not there from here" if base and missing else ""
        yield f"  - {entry if len(given) > 1 else given['path']}{comment}"


def _name_of_a_checkpoint(place: str) -> str:
    """`checkpoint-500` says nothing of whose it is."""
    run, name = os.path.split(place)
    return f"{os.path.basename(run)}-{name}" if _STEP.fullmatch(name) and run.strip("./") else ""  # noqa: PTH119


def _scalar(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else yaml_text(text)


def _not_listed(left_out: Mapping[str, list[str]], lying: _Lying) -> Iterator[str]:
    for run, names in left_out.items():
        yield f"  # not listed: {counted(len(names), 'earlier checkpoint')} of {quoted(run, 200)} ({listing(names)})"
    if lying.closed:
        yield f"  # not looked into, cannot be read: {listing(map(quoted, lying.closed))}"


def _foot() -> list[str]:
    return [
        "",
        "# checks:                # severities and limits; docs/checks.md explains each",
        "#   rounding-loss: error",
        "# allow-pickle: true     # only if you trust whoever made the .bin files",
    ]
