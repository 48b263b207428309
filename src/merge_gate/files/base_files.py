"""A base's directory → `BaseFiles`: every stored tensor, what is declared, and what contradicts itself. No torch.

In: a directory, which is hostile. Out: `BaseFiles`, or `ResolveError` if the files cannot be read at all. Reads
headers, the index and JSON files; values only to compare tensors that are stored twice.

1. The files that transformers loads must be there and whole. The rules are those of `_get_resolved_checkpoint_files`
   in transformers 5.24 (modeling_utils.py): the file that config.json names under `transformers_weights`;
   model.safetensors; the shards that model.safetensors.index.json names, whatever their names and folders; with leave
   to read pickles, the same for pytorch_model.bin.
2. Index and headers are compared both ways; names that are stored twice are compared byte by byte.
3. Declared and stored formats are compared (base_formats.py).
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_gate._internal.errors import ResolveError
from merge_gate._internal.text import counted, is_inside, listing
from merge_gate.files import base_formats, json_object
from merge_gate.files.headers import (
    CorruptFileError,
    PickleReader,
    TruncatedFileError,
    lfs_pointer,
    open_regular,
    parse_file,
    parse_places,
    shown,
)
from merge_gate.judging.all_checks import refused
from merge_gate.judging.checks.base_inconsistent import BASE_INCONSISTENT
from merge_gate.judging.checks.phrases import are
from merge_gate.records.files import CONFIG_NAME, WEIGHTS_NAME, BaseFiles, StoredTensor
from merge_gate.records.refusals import Refusal
from merge_gate.records.terms import Finding, Severity

MODEL, MODEL_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
INDEX_ENDING, SAFETENSORS_ENDING = ".index.json", ".safetensors"

FETCH_AGAIN = "fetch or copy the base again and compare the sizes of its files"
INCOMPLETE, INCONSISTENT, FORMAT = "base-incomplete", "base-inconsistent", "base-format"
"""Ids of the checks of bases (judging/checks/)."""

_LISTED = 6
_CHUNK_BYTES = 1 << 20
_MAX_CARD_BYTES = 100_000
_BASE_IN_CARD = re.compile(r"^base_model:[ \t]*(?:\n[ \t]*-[ \t]*)?[\"']?([\w.-]+/[\w.-]+)[\"']?[ \t]*$", re.MULTILINE)
_DTYPES = ("float16", "bfloat16", "float32", "float64", "half", "float", "double")
_SAME_DTYPES = {"half": "float16", "float": "float32", "double": "float64"}
_DTYPE_ALIASES = {"fp16": "float16", "f16": "float16", "bf16": "bfloat16", "fp32": "float32", "f32": "float32"} | {
    f"torch.{name}": name for name in _DTYPES
}
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight")


_Place = tuple[StoredTensor, int, int]
"""A tensor and where its values begin and end in its file; 0 and 0 if only torch can tell."""


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


def loaded_files(directory: str) -> WeightFiles:
    """The weight files in a base's directory that transformers loads. Whether they are whole is another question.

    Raises:
        ResolveError: there are none, or the index cannot be used.
    """
    try:
        config = read_config(directory, directory)
    except ResolveError:  # read_base says what is wrong with it
        config = {}
    names = _names(directory, directory)
    return choose(names, functools.partial(Path, directory), config, name=directory, allow_pickle=True)


def choose(
    names: frozenset[str], path_of: Callable[[str], Path], config: Mapping[str, Any], *, name: str, allow_pickle: bool
) -> WeightFiles:
    """What transformers loads of these files. `path_of` gives an index's place on disk; `name` is the base's.

    The file that config.json names goes before all others.

    Raises:
        ResolveError: there are no weights, only pickles, or the index cannot be used.
    """
    explicit = config.get("transformers_weights")
    first = _named(explicit, name) if isinstance(explicit, str) else _first(names, name=name, allow_pickle=allow_pickle)
    if not first.endswith(INDEX_ENDING):
        return WeightFiles(files=(first,))
    listed = _read_index(path_of(first), first, name)
    files = tuple(sorted(set(listed.values())))
    for file in files:
        _refuse_place(file, first, name)
        if first != BIN_INDEX and not file.endswith(SAFETENSORS_ENDING):
            what = f"{first} names {shown(file)}, expected names that end with {SAFETENSORS_ENDING}"
            raise _broken(what, name, "give the shard its real ending, in the directory and in the index")
    return WeightFiles(files=files, index=first, listed=listed)


def read_base(
    directory: str,
    *,
    name: str,
    allow_pickle: bool = False,
    read_pickle: PickleReader | None = None,
    has_values: bool = True,
) -> BaseFiles:
    """Read the facts in a base's files. If `has_values` is False, the weight files are stubs with headers alone.

    `read_pickle` lists the tensors of pickled files; without it, they are not known.

    Raises:
        ResolveError: a file is absent, a Git LFS pointer, cut off, or not what its name claims.
    """
    # 1. The files that are loaded.
    names = _names(directory, name)
    _refuse_adapter(names, name)
    config = read_config(directory, name) if "config.json" in names else {}
    place = functools.partial(Path, directory)
    chosen = choose(names, place, config, name=name, allow_pickle=allow_pickle)
    if "config.json" not in names:
        raise ResolveError(
            f"the base {shown(name)} has weights but no config.json, so nothing says which architecture it is",
            hint="name a directory or repository in the format that transformers' save_pretrained writes",
            check=INCOMPLETE,
        )
    _refuse_absent(directory, chosen, name)
    places, weight_bytes = list[_Place](), 0
    for file in chosen.files:
        weight_bytes += _read_weights(directory, file, name, read_pickle, places)
    first: dict[str, _Place] = {}
    again = [place for place in places if first.setdefault(place[0].name, place) is not place]
    # 2. Index and headers.
    held = {(tensor.name, tensor.file) for tensor, _, _ in places}
    listed = chosen.listed if read_pickle or chosen.index != BIN_INDEX else None
    ghosts = tuple(pair for pair in (listed or {}).items() if pair not in held)
    note = _Notes(directory, name, has_values=has_values)
    different = note.compare(first, again)
    # 3. Formats.
    declared = base_formats.declared_in(directory, config)
    original = _original(directory)
    own = [tensor for tensor, _, _ in first.values()]
    of_formats = base_formats.findings_of(own, declared, config, label=name, original=original)
    note.ghosts(ghosts, chosen)
    # transformers loads all tensors of a file, also those that the index does not list
    unlisted = () if listed is None else tuple(tensor for tensor in first if tensor not in listed)
    note.unlisted(unlisted, chosen)
    note.second_set(names, chosen)
    note.tied(first, config)
    return BaseFiles(
        directory=directory,
        weights=chosen.files,
        index=chosen.index,
        weight_bytes=weight_bytes,
        tensors=tuple(tensor for tensor, _, _ in places),
        ghosts=ghosts,
        unlisted=unlisted,
        quantization=declared,
        original=original,
        auto_dtype=_auto_dtype(config, name),
        is_float32=(config.get("dtype") or config.get("torch_dtype")) == "float32",
        config_dtypes=tuple(dict.fromkeys(_dtypes_named(config))),
        findings=(*different, *of_formats),
        notes=tuple(note.findings),
        is_streamed=not has_values,
    )


# --- 1. --------------------------------------------------------------------------------------------------------------


def read_config(directory: str, name: str) -> dict[str, Any]:
    """config.json as transformers reads it: NaN and repeated keys are allowed.

    Raises:
        ResolveError: it is not a JSON object, or a Git LFS pointer.
    """
    content = _content(directory, "config.json", name)
    try:
        config = json.loads(content.decode("utf-8"))
        what = "" if isinstance(config, dict) else f"holds {json_object.kind(config)}, expected a JSON object"
    except UnicodeDecodeError:
        what = "is not UTF-8 text"
    except RecursionError:
        what = "is nested too deeply"
    except ValueError as error:
        what = f"is not valid JSON: {str(error)[:120]}"
    if what:
        raise _broken(f"config.json {what}", name)
    return config  # type: ignore[no-any-return] # isinstance above


def _names(directory: str, name: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(directory))  # noqa: PTH208 (names are all that is wanted)
    except OSError as error:
        raise ResolveError(
            f"the base {shown(name)} cannot be read: {error.strerror or error}",
            hint="check that the user who runs the gate may read it",
        ) from error


def _refuse_adapter(names: frozenset[str], name: str) -> None:
    if CONFIG_NAME in names and {MODEL, MODEL_INDEX, BIN, BIN_INDEX} & names:
        raise ResolveError(
            f"the base {shown(name)} has an {CONFIG_NAME} next to its weights: transformers would load that adapter "
            "into it before anything is merged",
            hint=f"remove {CONFIG_NAME} from the base (save_pretrained of a merged model leaves it behind)",
        )


def _refuse_absent(directory: str, chosen: WeightFiles, name: str) -> None:
    """Absent shards are named together. A link to nothing is named by itself, with its own remedy."""
    places = [(file, Path(directory, file)) for file in chosen.files]
    absent = [file for file, path in places if not path.exists() and not path.is_symlink()]
    if absent and chosen.index:
        raise ResolveError(
            f"the base {shown(name)} is incomplete: {chosen.index} names {counted(len(absent), 'shard')} that "
            f"{'is' if len(absent) == 1 else 'are'} not there ({listing(map(shown, absent), _LISTED)})",
            hint=FETCH_AGAIN,
            check=INCOMPLETE,
        )


def _read_weights(directory: str, file: str, name: str, read_pickle: PickleReader | None, places: list[_Place]) -> int:
    """Add the tensors of one file, which must be whole. Returns its size in bytes."""
    try:
        with open_regular(str(Path(directory, file))) as opened:
            if (size := lfs_pointer(opened)) is not None:
                raise _pointer_error(name, file, size)
            size_bytes = os.fstat(opened.fileno()).st_size
            if file.endswith(SAFETENSORS_ENDING):
                held = parse_places(opened)
            else:
                listed = read_pickle(str(Path(directory, file))) if read_pickle else ()
                if isinstance(listed, Refusal):
                    words = refused(listed)
                    raise _broken(f"{shown(file)}: {words.message}", name, words.hint, check=INCONSISTENT)
                held = tuple((tensor, 0, 0) for tensor in listed)
            places += ((replace(tensor, file=file), begin, end) for tensor, begin, end in held)
            return size_bytes
    except CorruptFileError as error:
        check = INCOMPLETE if isinstance(error, TruncatedFileError) else INCONSISTENT
        raise _broken(f"{shown(file)} {error}", name, check=check) from error
    except OSError as error:
        raise _unreadable(directory, file, name, error) from error


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
        what = f"transformers_weights in config.json is {shown(explicit)}, expected a safetensors file or its index"
        raise _broken(what, name, "remove transformers_weights from config.json, or name the safetensors file")
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


def _read_index(path: Path, index: str, name: str) -> dict[str, str]:
    try:
        content = json_object.parse(_content(str(path.parent), path.name, name))
    except json_object.InvalidObjectError as error:
        raise _broken(f"{index} {error}", name) from error
    listed = content.get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(value, str) for value in listed.values()):
        raise _broken(f"{index} has no weight_map", name)
    if not isinstance(content.get("metadata"), dict):
        what = f'{index} has no "metadata", without which transformers does not load it'
        raise _broken(what, name, 'add "metadata": {} to the index, next to weight_map')
    return listed


def _content(directory: str, file: str, name: str) -> bytes:
    """The bytes of a JSON file."""
    try:
        with open_regular(str(Path(directory, file))) as opened:
            if (size := lfs_pointer(opened)) is not None:
                raise _pointer_error(name, file, size)
            opened.seek(0)
            return opened.read(json_object.LONGEST_BYTES)
    except CorruptFileError as error:
        raise _broken(f"{file} {error}", name) from error
    except OSError as error:
        raise _unreadable(directory, file, name, error) from error


def _refuse_place(file: str, named_in: str, name: str) -> None:
    """A name must stay inside of the base's directory: an index is as hostile as the rest."""
    if not is_inside(file):
        what = f"{named_in} names {shown(file)}, expected the plain name of a file inside the base's directory"
        raise _broken(what, name, "correct the index: names in it are relative to its own directory")


def _broken(what: str, name: str, hint: str = FETCH_AGAIN, *, check: str = INCONSISTENT) -> ResolveError:
    return ResolveError(f"the base {shown(name)} is broken: {what}", hint=hint, check=check)


def _unreadable(directory: str, file: str, name: str, error: OSError) -> ResolveError:
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


def _pointer_error(name: str, file: str, size: str) -> ResolveError:
    """The error of a Git LFS pointer in the place of a file of this size."""
    expected = f", expected {size}" if size else ""
    return ResolveError(
        f"the base {shown(name)} has a Git LFS pointer where {file} should be{expected}",
        hint="fetch it with `git lfs pull`; in a workflow give actions/checkout `lfs: true`",
        check=INCOMPLETE,
    )


def _original(directory: str) -> str | None:
    """The base that the model card names, under `base_model` in README.md: for a quantized model, the original."""
    try:
        with open_regular(str(Path(directory, "README.md"))) as file:
            card = file.read(_MAX_CARD_BYTES).decode("utf-8", "replace")
    except (OSError, CorruptFileError):
        return None
    head = card.split("---", 2)[1] if card.startswith("---") and card.count("---") > 1 else ""
    match = _BASE_IN_CARD.search(head)
    return match[1] if match else None


def _dtypes_named(config: Mapping[str, Any]) -> Iterator[str]:
    """The dtypes of a config and of its parts, in torch's words."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for dtype in part.values():  # also of a table of dtypes
            if isinstance(dtype, str) and dtype in _DTYPES:
                yield _SAME_DTYPES.get(dtype, dtype)


def _auto_dtype(config: Mapping[str, Any], name: str) -> Finding | None:
    """Why transformers cannot load the base in the dtype that config.json names; None if it can."""
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    dtype = config.get(key)
    if dtype is None or isinstance(dtype, dict) or dtype in _DTYPES:
        return None
    meant = f'write "{_DTYPE_ALIASES[dtype]}" there, or ' if isinstance(dtype, str) and dtype in _DTYPE_ALIASES else ""
    message = (
        f"the base {shown(name)} cannot be loaded: {key} in its config.json is {shown(str(dtype))}, expected a "
        "floating-point dtype of torch, such as float16"
    )
    hint = f"{meant}set base.dtype in the gate's config, or --dtype, to the dtype that is meant"
    return BASE_INCONSISTENT.finding(message, hint)


# --- 2. --------------------------------------------------------------------------------------------------------------


def _listed_elsewhere(directory: str) -> set[str]:
    """Shards of an index that transformers does not read, since it loads model.safetensors."""
    try:
        place = functools.partial(Path, directory)
        return set(choose(frozenset({MODEL_INDEX}), place, {}, name="", allow_pickle=False).files)
    except ResolveError:
        return set()


class _Notes:
    """Findings about a base that do not keep it from being loaded."""

    def __init__(self, directory: str, name: str, *, has_values: bool) -> None:
        self._directory, self._name, self._has_values = directory, name, has_values
        self.findings: list[Finding] = []

    def compare(self, first_places: Mapping[str, _Place], again: list[_Place]) -> list[Finding]:
        """One name in two files: the same bytes are a note, other bytes are a contradiction."""
        if again and not self._has_values:
            return [self._not_compared(again[0][0].name)]
        same = [place[0].name for place in again]
        for place in again:
            tensor, first = place[0], first_places[place[0].name]
            if not self._is_same(first, place):
                message = (
                    f"the base {shown(self._name)} cannot be judged: its tensor {shown(tensor.name)} is in "
                    f"{shown(first[0].file)} and in {shown(tensor.file)} with different values"
                )
                hint = "remove the wrong one from its file and from the index, or fetch the base again"
                return [BASE_INCONSISTENT.finding(message, hint, tensor=tensor.name)]
        if same:
            self._add(
                f"{counted(len(same), 'tensor')} of the base {shown(self._name)} {are(same)} stored twice with "
                f"the same bytes: {_names_of(same)}",
                same[0],
            )
        return []

    def _not_compared(self, tensor: str) -> Finding:
        message = (
            f"the base {shown(self._name)} cannot be judged while it is streamed: its tensor {shown(tensor)} is in two "
            "files, and their values were not compared"
        )
        return BASE_INCONSISTENT.finding(message, "set access: download for this base", tensor=tensor)

    def ghosts(self, ghosts: tuple[tuple[str, str], ...], chosen: WeightFiles) -> None:
        if ghosts:
            self._add(
                f"{chosen.index} of the base {shown(self._name)} names {counted(len(ghosts), 'tensor')} that "
                f"{are(ghosts)} not in the files that it names: {_names_of([name for name, _ in ghosts])}",
                ghosts[0][0],
            )

    def unlisted(self, unlisted: tuple[str, ...], chosen: WeightFiles) -> None:
        if unlisted:
            self._add(
                f"{counted(len(unlisted), 'tensor')} in the files of the base {shown(self._name)} "
                f"{are(unlisted)} not listed in {chosen.index}; transformers loads all tensors of a file: "
                f"{_names_of(list(unlisted))}",
                unlisted[0],
            )

    def second_set(self, names: frozenset[str], chosen: WeightFiles) -> None:
        """Other safetensors files with tensors, as far as these can be read: a second set, or half of one."""
        more = [MODEL_INDEX] if chosen.files == (MODEL,) and MODEL_INDEX in names else []
        listed = _listed_elsewhere(self._directory) if more else set()
        others = {file for file in names | listed if file.endswith(SAFETENSORS_ENDING)} - {*chosen.files, WEIGHTS_NAME}
        files = [file for file in sorted(others) if self._has_tensors(file)]
        if files or more:
            self._add(
                f"the base {shown(self._name)} has weights that transformers does not load: "
                f"{listing(map(shown, [*more, *files]), _LISTED)}; it loads {listing(map(shown, chosen.files), 2)}",
                None,
            )

    def tied(self, first: Mapping[str, _Place], config: Mapping[str, Any]) -> None:
        """The config ties the head to the embedding, and the files hold two tensors that differ."""
        if config.get("tie_word_embeddings") is not True or not self._has_values:
            return
        head = next((place for name, place in first.items() if name.endswith("lm_head.weight")), None)
        embeddings = [place for name, place in first.items() if name.endswith(_EMBEDDINGS)]
        if head is None or len(embeddings) != 1 or self._is_same(head, embeddings[0]):
            return
        self._add(
            f"config.json of the base {shown(self._name)} ties {shown(head[0].name)} to "
            f"{shown(embeddings[0][0].name)}, and its files hold two tensors with different values: transformers "
            "does not tie them",
            head[0].name,
        )

    def _has_tensors(self, file: str) -> bool:
        with suppress(OSError, CorruptFileError), open_regular(str(Path(self._directory, file))) as opened:
            return bool(parse_file(opened))
        return False  # transformers does not open it either

    def _is_same(self, first: _Place, second: _Place) -> bool:
        (tensor, begin, end), (other, other_begin, other_end) = first, second
        if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
            return False
        if not end or not other_end:
            return True  # only torch can tell
        try:
            with (
                open_regular(str(Path(self._directory, tensor.file))) as first_file,
                open_regular(str(Path(self._directory, other.file))) as second_file,
            ):
                first_file.seek(begin)
                second_file.seek(other_begin)
                for start in range(begin, end, _CHUNK_BYTES):
                    size = min(end - start, _CHUNK_BYTES)
                    if first_file.read(size) != second_file.read(size):
                        return False
        except (OSError, CorruptFileError):
            return False
        return True

    def _add(self, message: str, tensor: str | None) -> None:
        self.findings.append(BASE_INCONSISTENT.finding(message, severity=Severity.NOTE, tensor=tensor))


def _names_of(names: list[str]) -> str:
    return listing([shown(name) for name in names], _LISTED)
