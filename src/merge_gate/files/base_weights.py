"""Which weight files of a base transformers loads: by the names in its directory, its config.json, and its index.

In: names, or a directory, both hostile. Out: file names relative to the directory, or `ResolveError`. Reads the index
and no weights.

The rules are those of `_get_resolved_checkpoint_files` in transformers 5.24 (modeling_utils.py):

1. The file that config.json names under `transformers_weights`. 2. model.safetensors. 3. The shards that
model.safetensors.index.json names, whatever their names and folders. 4. With leave to read pickles, the same for
pytorch_model.bin.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_gate.errors import ResolveError
from merge_gate.files import json_object
from merge_gate.files.headers import CorruptFileError, lfs_pointer, open_regular, shown
from merge_gate.names.foreign_names import is_inside
from merge_gate.records.files import CONFIG_NAME
from merge_gate.text import counted, listing

MODEL, MODEL_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
INDEX_ENDING, SAFETENSORS_ENDING = ".index.json", ".safetensors"

FETCH_AGAIN = "fetch or copy the base again and compare the sizes of its files"
INCOMPLETE, INCONSISTENT, FORMAT = "base-incomplete", "base-inconsistent", "base-format"
"""Ids of the checks of bases (judging/checks/)."""

_LISTED = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """The files that are loaded, in transformers' order; `listed` is the index's map of names to files, if it has one.

    `index` is the index's own name.
    """

    files: tuple[str, ...]
    index: str | None = None
    listed: Mapping[str, str] | None = None

    @property
    def all_files(self) -> tuple[str, ...]:
        """With the index, which comes first."""
        return (self.index, *self.files) if self.index else self.files


def choose(
    names: frozenset[str], path_of: Callable[[str], Path], *, name: str, allow_pickle: bool, explicit: str | None = None
) -> WeightFiles:
    """What transformers loads of these files. `path_of` gives an index's place on disk; `name` is the base's.

    Raises:
        ResolveError: there are no weights, only pickles, or the index cannot be used.
    """
    first = _first(names, name=name, allow_pickle=allow_pickle) if explicit is None else _named(explicit, name)
    if not first.endswith(INDEX_ENDING):
        return WeightFiles(files=(first,))
    listed = _read_index(path_of(first), first, name)
    files = tuple(sorted(set(listed.values())))
    for file in files:
        _refuse_place(file, first, name)
        if first != BIN_INDEX and not file.endswith(SAFETENSORS_ENDING):
            raise ResolveError(
                f"the base {shown(name)} is broken: {first} names {shown(file)}, expected names that end with "
                f"{SAFETENSORS_ENDING}",
                hint="give the shard its real ending, in the directory and in the index",
                check=INCONSISTENT,
            )
    return WeightFiles(files=files, index=first, listed=listed)


def explicit_file(config: Mapping[str, Any]) -> str | None:
    """The file that config.json names, which goes before all others."""
    named = config.get("transformers_weights")
    return named if isinstance(named, str) else None


def read_config(directory: str, name: str) -> dict[str, Any]:
    """config.json as transformers reads it: NaN and repeated keys are allowed.

    Raises:
        ResolveError: it is not a JSON object, or a Git LFS pointer.
    """
    path = Path(directory, "config.json")
    try:
        with open_regular(str(path)) as file:
            if pointer := lfs_pointer(file):
                raise pointer_error(name, "config.json", pointer.size_bytes)
            file.seek(0)
            raw = file.read(json_object.LONGEST_BYTES)
        config = json.loads(raw.decode("utf-8"))
        what = "" if isinstance(config, dict) else f"holds {json_object.kind(config)}, expected a JSON object"
    except CorruptFileError as error:
        what = str(error)
    except UnicodeDecodeError:
        what = "is not UTF-8 text"
    except RecursionError:
        what = "is nested too deeply"
    except ValueError as error:
        what = f"is not valid JSON: {str(error)[:120]}"
    except OSError as error:
        raise unreadable(directory, "config.json", name, error) from error
    if what:
        raise ResolveError(
            f"the base {shown(name)} is broken: config.json {what}", hint=FETCH_AGAIN, check=INCONSISTENT
        )
    return config  # type: ignore[no-any-return] # isinstance above


def unreadable(directory: str, file: str, name: str, error: OSError) -> ResolveError:
    """The error of a file that cannot be opened: a link to a file that is not there has its own remedy."""
    path = Path(directory, file)
    if path.is_symlink() and not path.exists():
        target = path.readlink()
        return ResolveError(
            f"the base {shown(name)} is incomplete: {shown(file)} is a link to {shown(str(target))}, which is "
            "not there",
            hint="the cache has lost this file: remove the link and download the base again, with network access"
            if "blobs" in target.parts
            else "restore the file that the link names, or copy the base with its files instead of links",
            check=INCOMPLETE,
        )
    if isinstance(error, FileNotFoundError):
        return ResolveError(
            f"the base {shown(name)} is incomplete: {shown(file)} is not there", hint=FETCH_AGAIN, check=INCOMPLETE
        )
    return ResolveError(
        f"the base {shown(name)} cannot be read: {shown(file)}: {error.strerror or error}",
        hint="check that the user who runs the gate may read it",
    )


def pointer_error(name: str, file: str, size_bytes: int | None) -> ResolveError:
    """The error of a Git LFS pointer in the place of a file."""
    size = f", expected {counted(size_bytes, 'byte')}" if size_bytes is not None else ""
    return ResolveError(
        f"the base {shown(name)} has a Git LFS pointer where {file} should be{size}",
        hint="fetch it with `git lfs pull`; in a workflow give actions/checkout `lfs: true`",
        check=INCOMPLETE,
    )


# --- the first file --------------------------------------------------------------------------------------------------


def _first(names: Iterable[str], *, name: str, allow_pickle: bool) -> str:
    plain = {n for n in names if "/" not in n}
    for file in (MODEL, MODEL_INDEX):
        if file in plain:
            return file
    pickles = [file for file in (BIN, BIN_INDEX) if file in plain]
    if pickles and allow_pickle:
        return pickles[0]
    if pickles:
        raise ResolveError(
            f"the base {shown(name)} has pickled weights only ({pickles[0]}), which can run code when they are loaded",
            hint="use a revision or a copy with safetensors weights, or, if you trust it, set allow-pickle: true in "
            "the gate's config",
        )
    raise _no_weights(frozenset(names), name)


def _named(explicit: str, name: str) -> str:
    """Rule 1. Transformers refuses other endings, and places outside of the directory."""
    _refuse_place(explicit, "config.json", name)
    if not explicit.endswith((SAFETENSORS_ENDING, f"{SAFETENSORS_ENDING}{INDEX_ENDING}")):
        raise ResolveError(
            f"the base {shown(name)} is broken: transformers_weights in config.json is {shown(explicit)}, expected a "
            "safetensors file or its index",
            hint="remove transformers_weights from config.json, or name the safetensors file",
            check=INCONSISTENT,
        )
    return explicit


def _no_weights(names: frozenset[str], name: str) -> ResolveError:
    plain = {n for n in names if "/" not in n}
    some = listing(map(shown, sorted(plain)), _LISTED) or "nothing"
    what = f"the base {shown(name)} has no weights: no {MODEL} and no {MODEL_INDEX}; it holds {some}"
    if "model_index.json" in plain:
        return ResolveError(
            f"the base {shown(name)} is a diffusers pipeline (it has a model_index.json), not a transformers model",
            hint="the gate merges adapters of transformers models only: name a text or vision model, or check this "
            "adapter in its diffusers pipeline, with fuse_lora(safe_fusing=True)",
            check=FORMAT,
        )
    if "modules.json" in plain:
        return ResolveError(
            f"the base {shown(name)} is a sentence-transformers model (it has a modules.json) whose transformers model "
            "is in a folder of its own, or has no safetensors weights",
            hint="name the folder that holds config.json and model.safetensors (0_Transformer/ in older releases)",
            check=FORMAT,
        )
    if any(n.endswith(".gguf") for n in plain):
        return ResolveError(
            f"{what}: its format is GGUF, which cannot be judged",
            hint="gate and merge on the unquantized base in safetensors format, from which the GGUF file was made",
            check=FORMAT,
        )
    if CONFIG_NAME in plain:
        return ResolveError(what, hint="this is an adapter, not a full model: name the base that it was trained on")
    return ResolveError(
        what,
        hint="name a directory or repository in the format that transformers' save_pretrained writes",
        check=INCOMPLETE if "config.json" in plain else None,
    )


# --- the index -------------------------------------------------------------------------------------------------------


def _read_index(path: Path, index: str, name: str) -> dict[str, str]:
    try:
        with open_regular(str(path)) as file:
            if pointer := lfs_pointer(file):
                raise pointer_error(name, index, pointer.size_bytes)
            file.seek(0)
            content = json_object.parse(file.read(json_object.LONGEST_BYTES))
    except (CorruptFileError, json_object.InvalidObjectError) as error:
        raise _broken_index(f"{index} {error}", name) from error
    except OSError as error:
        raise unreadable(str(path.parent), path.name, name, error) from error
    listed = content.get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(value, str) for value in listed.values()):
        raise _broken_index(f"{index} has no weight_map", name)
    if not isinstance(content.get("metadata"), dict):
        raise ResolveError(
            f'the base {shown(name)} is broken: {index} has no "metadata", without which transformers does not load it',
            hint='add "metadata": {} to the index, next to weight_map',
            check=INCONSISTENT,
        )
    return listed


def _broken_index(what: str, name: str) -> ResolveError:
    return ResolveError(f"the base {shown(name)} is broken: {what}", hint=FETCH_AGAIN, check=INCONSISTENT)


def _refuse_place(file: str, named_in: str, name: str) -> None:
    """A name must stay inside of the base's directory: an index is as hostile as the rest."""
    if not is_inside(file):
        raise ResolveError(
            f"the base {shown(name)} is broken: {named_in} names {shown(file)}, expected the plain name of a file "
            "inside the base's directory",
            hint="correct the index: names in it are relative to its own directory",
            check=INCONSISTENT,
        )
