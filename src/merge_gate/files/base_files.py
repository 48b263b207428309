"""A base's directory → `BaseFiles`: every stored tensor, what is declared, and what contradicts itself. No torch.

In: a directory, which is hostile. Out: `BaseFiles`, or `ResolveError` if the files cannot be read at all. Reads
headers, the index and JSON files; values only to compare tensors that are stored twice.

1. The files that transformers loads must be there and whole (base_weights.py).
2. Index and headers are compared both ways; names that are stored twice are compared byte by byte.
3. Declared and stored formats are compared (base_formats.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from merge_gate.errors import ResolveError
from merge_gate.files import base_formats, base_weights
from merge_gate.files.base_weights import (
    BIN,
    BIN_INDEX,
    FETCH_AGAIN,
    INCOMPLETE,
    INCONSISTENT,
    MODEL,
    MODEL_INDEX,
    SAFETENSORS_ENDING,
    WeightFiles,
)
from merge_gate.files.headers import (
    CorruptFileError,
    TruncatedFileError,
    lfs_pointer,
    open_regular,
    parse_places,
    shown,
)
from merge_gate.files.pickle_scan import read_pickled
from merge_gate.judging.checks.base_inconsistent import BASE_INCONSISTENT
from merge_gate.records.files import CONFIG_NAME, WEIGHTS_NAME, BaseFiles, StoredTensor
from merge_gate.records.terms import Finding, Severity
from merge_gate.text import counted, listing

_LISTED = 6
_CHUNK_BYTES = 1 << 20
_MAX_CARD_BYTES = 100_000
_BASE_IN_CARD = re.compile(r"^base_model:[ \t]*(?:\n[ \t]*-[ \t]*)?[\"']?([\w.-]+/[\w.-]+)[\"']?[ \t]*$", re.MULTILINE)
_DTYPES = ("float16", "bfloat16", "float32", "float64", "half", "float", "double")
_DTYPE_ALIASES = {"fp16": "float16", "f16": "float16", "bf16": "bfloat16", "fp32": "float32", "f32": "float32"} | {
    f"torch.{name}": name for name in _DTYPES
}
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight")


@dataclass(slots=True, kw_only=True)
class _Tensor:
    """A tensor and where its values are; `begin` is None if only torch can tell."""

    stored: StoredTensor
    begin: int | None = None
    end: int = 0


@dataclass(slots=True)
class _Contents:
    """What the weight files hold. `first` has the first tensor of each name, `again` the later ones."""

    size_bytes: int = 0
    """Of the files together."""

    tensors: list[StoredTensor] = field(default_factory=list)
    first: dict[str, _Tensor] = field(default_factory=dict)
    again: list[_Tensor] = field(default_factory=list)

    def add(self, tensor: _Tensor) -> None:
        self.tensors.append(tensor.stored)
        if self.first.setdefault(tensor.stored.name, tensor) is not tensor:
            self.again.append(tensor)


def loaded_files(directory: str) -> WeightFiles:
    """The weight files in a base's directory that transformers loads. Whether they are whole is another question.

    Raises:
        ResolveError: there are none, or the index cannot be used.
    """
    try:
        config = base_weights.read_config(directory, directory)
    except ResolveError:  # read_base says what is wrong with it
        config = {}
    return _chosen(directory, config, name=directory, allow_pickle=True)


def _chosen(directory: str, config: Mapping[str, Any], *, name: str, allow_pickle: bool) -> WeightFiles:
    return base_weights.choose(
        _names(directory, name),
        lambda file: Path(directory, file),
        name=name,
        allow_pickle=allow_pickle,
        explicit=base_weights.explicit_file(config),
    )


def read_base(directory: str, *, name: str, allow_pickle: bool = False, has_values: bool = True) -> BaseFiles:
    """All that a base's files say. If `has_values` is False, the weight files are stubs with headers alone.

    Raises:
        ResolveError: a file is absent, a Git LFS pointer, cut off, or not what its name claims.
    """
    # 1. The files that are loaded.
    names = _names(directory, name)
    _refuse_adapter(names, name)
    config = base_weights.read_config(directory, name) if "config.json" in names else {}
    chosen = _chosen(directory, config, name=name, allow_pickle=allow_pickle)
    if "config.json" not in names:
        raise ResolveError(
            f"the base {shown(name)} has weights but no config.json, so nothing says which architecture it is",
            hint="name a directory or repository in the format that transformers' save_pretrained writes",
            check=INCOMPLETE,
        )
    _refuse_absent(directory, chosen, name)
    contents = _Contents()
    for file in chosen.files:
        _read_weights(directory, file, name, contents)
    # 2. Index and headers.
    ghosts = tuple((n, file) for n, file in (chosen.listed or {}).items() if n not in contents.first)
    aside = _aside(directory, chosen, name)
    note = _Notes(directory, name, has_values=has_values)
    different = note.compare(contents)
    # 3. Formats.
    declared = base_formats.declared_in(directory, config)
    original = _original(directory)
    own = [tensor.stored for tensor in contents.first.values()]
    of_formats = base_formats.findings_of(own, declared, config, label=name, original=original)
    note.ghosts(ghosts, chosen)
    unlisted = _unlisted(contents, chosen)
    note.unlisted(unlisted, chosen)
    note.second_set(aside, chosen)
    note.tied(contents, config)
    return BaseFiles(
        directory=directory,
        weights=chosen.files,
        weight_bytes=contents.size_bytes,
        tensors=tuple(contents.tensors),
        ghosts=ghosts,
        unlisted=unlisted,
        aside=aside,
        quantization=declared,
        original=original,
        auto_dtype=_auto_dtype(config, name),
        findings=(*different, *of_formats),
        notes=tuple(note.findings),
        is_streamed=not has_values,
    )


# --- 1. --------------------------------------------------------------------------------------------------------------


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


def _read_weights(directory: str, file: str, name: str, contents: _Contents) -> None:
    """Add the tensors of one file, which must be whole."""
    try:
        with open_regular(str(Path(directory, file))) as opened:
            if pointer := lfs_pointer(opened):
                raise base_weights.pointer_error(name, file, pointer.size_bytes)
            size_bytes = os.fstat(opened.fileno()).st_size
            contents.size_bytes += size_bytes
            if file.endswith(SAFETENSORS_ENDING):
                for tensor, begin, end in parse_places(opened):
                    contents.add(_Tensor(stored=replace(tensor, file=file), begin=begin, end=end))
                return
            for tensor in read_pickled(opened, size_bytes) or ():
                contents.add(_Tensor(stored=replace(tensor, file=file)))
    except CorruptFileError as error:
        check = INCOMPLETE if isinstance(error, TruncatedFileError) else INCONSISTENT
        raise ResolveError(
            f"the base {shown(name)} is broken: {shown(file)} {error}", hint=FETCH_AGAIN, check=check
        ) from error
    except OSError as error:
        raise base_weights.unreadable(directory, file, name, error) from error


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


def _aside(directory: str, chosen: WeightFiles, name: str) -> tuple[StoredTensor, ...]:
    """Tensors in the directory's other safetensors files, as far as these can be read: a second set, or half of one."""
    names = set(_names(directory, name))
    if chosen.files == (MODEL,) and MODEL_INDEX in names:
        names |= _listed_elsewhere(directory)
    others = {file for file in names if file.endswith(SAFETENSORS_ENDING)} - {*chosen.files, WEIGHTS_NAME}
    tensors: list[StoredTensor] = []
    for file in sorted(others):
        try:
            with open_regular(str(Path(directory, file))) as opened:
                tensors.extend(replace(tensor, file=file) for tensor, _, _ in parse_places(opened))
        except (OSError, CorruptFileError):  # transformers does not open it either
            continue
    return tuple(tensors)


def _listed_elsewhere(directory: str) -> set[str]:
    """Shards of an index that transformers does not read, since it loads model.safetensors."""
    try:
        chosen = base_weights.choose(
            frozenset({MODEL_INDEX}), lambda file: Path(directory, file), name="", allow_pickle=False
        )
    except ResolveError:
        return set()
    return set(chosen.files)


def _unlisted(contents: _Contents, chosen: WeightFiles) -> tuple[str, ...]:
    """Tensors that the index does not list. transformers loads all tensors of a file."""
    listed = chosen.listed
    return () if listed is None else tuple(name for name in contents.first if name not in listed)


class _Notes:
    """Findings about a base that do not keep it from being loaded."""

    def __init__(self, directory: str, name: str, *, has_values: bool) -> None:
        self._directory, self._name, self._has_values = directory, name, has_values
        self.findings: list[Finding] = []

    def compare(self, contents: _Contents) -> list[Finding]:
        """One name in two files: the same bytes are a note, other bytes are a contradiction."""
        if contents.again and not self._has_values:
            return [self._not_compared(contents.again[0].stored.name)]
        same: list[StoredTensor] = []
        for tensor in contents.again:
            first = contents.first[tensor.stored.name]
            if not self._is_same(first, tensor):
                message = (
                    f"the base {shown(self._name)} cannot be judged: its tensor {shown(tensor.stored.name)} is in "
                    f"{shown(first.stored.file)} and in {shown(tensor.stored.file)} with different values"
                )
                hint = "remove the wrong one from its file and from the index, or fetch the base again"
                return [BASE_INCONSISTENT.finding(message, hint, tensor=tensor.stored.name)]
            same.append(tensor.stored)
        if same:
            self._add(
                f"{counted(len(same), 'tensor')} of the base {shown(self._name)} {_are(len(same))} stored twice with "
                f"the same bytes: {_names_of([tensor.name for tensor in same])}",
                same[0].name,
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
                f"{_are(len(ghosts))} not in the files that it names: {_names_of([name for name, _ in ghosts])}",
                ghosts[0][0],
            )

    def unlisted(self, unlisted: tuple[str, ...], chosen: WeightFiles) -> None:
        if unlisted:
            self._add(
                f"{counted(len(unlisted), 'tensor')} in the files of the base {shown(self._name)} "
                f"{_are(len(unlisted))} not listed in {chosen.index}; transformers loads all tensors of a file: "
                f"{_names_of(list(unlisted))}",
                unlisted[0],
            )

    def second_set(self, aside: tuple[StoredTensor, ...], chosen: WeightFiles) -> None:
        files = sorted({tensor.file for tensor in aside})
        more = [MODEL_INDEX] if chosen.files == (MODEL,) and Path(self._directory, MODEL_INDEX).exists() else []
        if files or more:
            self._add(
                f"the base {shown(self._name)} has weights that transformers does not load: "
                f"{listing(map(shown, [*more, *files]), _LISTED)}; it loads {listing(map(shown, chosen.files), 2)}",
                None,
            )

    def tied(self, contents: _Contents, config: Mapping[str, Any]) -> None:
        """The config ties the head to the embedding, and the files hold two tensors that differ."""
        if config.get("tie_word_embeddings") is not True or not self._has_values:
            return
        head = next((tensor for name, tensor in contents.first.items() if name.endswith("lm_head.weight")), None)
        embeddings = [tensor for name, tensor in contents.first.items() if name.endswith(_EMBEDDINGS)]
        if head is None or len(embeddings) != 1 or self._is_same(head, embeddings[0]):
            return
        self._add(
            f"config.json of the base {shown(self._name)} ties {shown(head.stored.name)} to "
            f"{shown(embeddings[0].stored.name)}, and its files hold two tensors with different values: transformers "
            "does not tie them",
            head.stored.name,
        )

    def _is_same(self, first: _Tensor, second: _Tensor) -> bool:
        if (first.stored.dtype, first.stored.shape) != (second.stored.dtype, second.stored.shape):
            return False
        if first.begin is None or second.begin is None:
            return True  # only torch can tell
        try:
            with (
                open_regular(str(Path(self._directory, first.stored.file))) as first_file,
                open_regular(str(Path(self._directory, second.stored.file))) as second_file,
            ):
                first_file.seek(first.begin)
                second_file.seek(second.begin)
                left = first.end - first.begin
                while left > 0:
                    size = min(left, _CHUNK_BYTES)
                    if first_file.read(size) != second_file.read(size):
                        return False
                    left -= size
        except (OSError, CorruptFileError):
            return False
        return True

    def _add(self, message: str, tensor: str | None) -> None:
        self.findings.append(BASE_INCONSISTENT.finding(message, severity=Severity.NOTE, tensor=tensor))


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _names_of(names: list[str]) -> str:
    return listing([shown(name) for name in names], _LISTED)
