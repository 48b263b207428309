"""Compares the directory that adapter_config.json names as its base with the base of the run.

In: a path from a stranger's file, the adapter's headers, and the base's files. Out: a `NamedBase`, or None if no such
model is here. It reads configurations and headers within limits, and no values; it imports no torch.
"""

# 1. An absolute path of a directory. A configuration, an index, and weights are regular files inside of it.
# 2. Each tensor of the adapter belongs to a stored tensor, with a size that fits. A directory that only has the name
#    (`/model` in a container) says nothing.
# 3. Types, then shapes and sizes. A quantized copy, and another class of the same type, may differ in these.

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from merge_gate._internal.errors import ResolveError
from merge_gate._internal.regular_file import open_regular_file, read_regular_file
from merge_gate.files.base_files import SAFETENSORS_ENDING, WeightFiles, choose
from merge_gate.files.fitting_bases import belongs
from merge_gate.files.headers import DTYPE_BITS, CorruptFileError, parse_file
from merge_gate.judging.bounds import cut
from merge_gate.limits.timeout import within
from merge_gate.names.hub_names import hub_name
from merge_gate.records.files import CARD_NAME, AdapterFiles, BaseFiles, NamedBase, StoredTensor
from merge_gate.records.terms import Likeness

_TIMEOUT_S = 20.0
_MAX_CONFIG_BYTES, _MAX_CARD_BYTES = 10_000_000, 1_000_000
_MAX_FILES, _MAX_TENSORS = 1_000, 500_000
_CARD_BASE = re.compile(rb"^base_model:[ \t]*[\"']?(/[^\n\"']+?)[\"']?[ \t\r]*$", re.MULTILINE)


KnownDigests = Callable[[str], Mapping[str, str] | None]
"""The digests of the weight files in a directory, by name, if an earlier run computed them."""


def compare(files: AdapterFiles, base: BaseFiles, known_digests: KnownDigests = lambda _: None) -> NamedBase | None:
    """What the named directory is, next to the base; None if that says nothing. Never raises for a hostile path."""
    try:
        return within(_TIMEOUT_S, partial(_compare, files, base, known_digests))
    except (OSError, ValueError, RecursionError):  # TimeoutError is an OSError
        return None


def _compare(files: AdapterFiles, base: BaseFiles, known_digests: KnownDigests) -> NamedBase | None:
    named = files.config.base_name or ""
    used = None if not named or hub_name(named) else _config(base.directory, follow=True)
    if used is None:
        return None
    is_here = Path(named).is_absolute() and os.path.isdir(named)  # noqa: PTH112 (False where pathlib raises)
    here = _of_directory(named, files, base, used) if is_here else None
    if here is not None and here.likeness in {Likeness.ALIKE, Likeness.OTHER_SETTINGS}:
        known = known_digests(named)
        here = NamedBase(likeness=Likeness.SAME) if known and known == known_digests(base.directory) else here
    is_known = here is not None and here.likeness in {Likeness.SAME, Likeness.OTHER_TYPE}
    return here if is_known else _beside(files, used) or here


def _of_directory(named: str, files: AdapterFiles, base: BaseFiles, used: Mapping[str, Any]) -> NamedBase | None:
    if Path(named).samefile(base.directory):
        return NamedBase(likeness=Likeness.SAME)
    config = _config(named)
    weights = _weights(named, config) if config is not None else None
    if config is None or weights is None or not belongs(files.tensors, weights, has_shapes=not _quantization(config)):
        return None
    types = {"named": _type(config), "used": _type(used)}
    if not _types(config) & _types(used):
        return NamedBase(likeness=Likeness.OTHER_TYPE, **types)
    if _identities(named, weights) == _identities(base.directory, base.tensors):
        return NamedBase(likeness=Likeness.SAME)
    is_copy = bool(_quantization(config)) is not bool(_quantization(used))
    is_class = config.get("architectures") != used.get("architectures") or _type(config) != _type(used)
    difference = "" if is_copy else _difference(weights, base, is_class=is_class)
    if difference:
        return NamedBase(likeness=Likeness.OTHER_FILES, difference=difference)
    what = "quantization" if is_copy else "class" if is_class else ""
    return NamedBase(likeness=Likeness.OTHER_SETTINGS if what else Likeness.ALIKE, difference=what)


def _beside(files: AdapterFiles, used: Mapping[str, Any]) -> NamedBase | None:
    """Another type that the files next to the adapter name: a config.json, or the base in its card."""
    try:
        card = read_regular_file(Path(files.directory, CARD_NAME), _MAX_CARD_BYTES)
    except OSError:
        card = b""
    path = os.fsdecode(match[1]) if (match := _CARD_BASE.search(card)) else ""
    for file, directory in (("config.json", files.directory), (CARD_NAME, path)):
        config = _config(directory) if directory and os.path.isdir(directory) else None  # noqa: PTH112 (as above)
        if config is not None and _types(config) and not _types(config) & _types(used):
            return NamedBase(likeness=Likeness.OTHER_TYPE, named=_type(config), used=_type(used), file=file)
    return None


# --- configurations ------------------------------------------------------------------------------------------------


def _config(directory: str, *, follow: bool = False) -> dict[str, Any] | None:
    """config.json; through a link that leaves the directory only with `follow`."""
    path = Path(directory, "config.json")
    if not follow and not _is_inside(directory, "config.json"):
        return None
    try:
        with open_regular_file(path, follow=True) as file:
            config = json.loads(file.read(_MAX_CONFIG_BYTES))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def _is_inside(directory: str, name: str) -> bool:
    tree = os.path.realpath(directory)
    return os.path.commonpath((tree, os.path.realpath(Path(directory, name)))) == tree


def _type(config: Mapping[str, Any]) -> str:
    return cut(str(config.get("model_type") or ""))[:100]


def _types(config: Mapping[str, Any]) -> set[str]:
    """The types of a model and of its parts: a text model may be the part of another one."""
    parts = (config, *(part for part in config.values() if isinstance(part, dict)))
    return {_type(part) for part in parts} - {""}


def _quantization(config: Mapping[str, Any]) -> Any:
    return config.get("quantization_config") or config.get("compression_config")


# --- weights -------------------------------------------------------------------------------------------------------


def _weights(directory: str, config: Mapping[str, Any]) -> list[StoredTensor] | None:
    """The headers of the files that transformers loads; None for other formats, and for a link out of the directory."""
    names = frozenset(os.listdir(directory))  # noqa: PTH208 (names are all that is wanted)
    inside = frozenset(name for name in names if _is_inside(directory, name))
    try:
        chosen: WeightFiles = choose(inside, partial(Path, directory), config, name=directory, allow_pickle=False)
        if len(chosen.files) > _MAX_FILES or not all(_is_inside(directory, file) for file in chosen.files):
            return None
        tensors: list[StoredTensor] = []
        for name in chosen.files:
            with open_regular_file(Path(directory, name), follow=True) as file:
                tensors += (replace(tensor, file=name) for tensor in parse_file(file))
            if len(tensors) > _MAX_TENSORS:
                return None
    except (ResolveError, CorruptFileError, OSError):
        return None
    return tensors


def _identities(directory: str, tensors: Sequence[StoredTensor]) -> set[tuple[int, int]]:
    files = {tensor.file for tensor in tensors}
    states = (os.stat(Path(directory, name)) for name in files)  # noqa: PTH116 (follows links of the base)
    return {(state.st_dev, state.st_ino) for state in states}


def _difference(weights: Sequence[StoredTensor], base: BaseFiles, *, is_class: bool) -> str:
    """In what the stored tensors differ; empty if they do not. Another class may have other tensors."""
    here = {tensor.name: tensor for tensor in base.tensors}
    for tensor in weights:
        other = here.get(tensor.name)
        if other is not None and other.shape != tensor.shape:
            return f"{cut(tensor.name)[:200]} has shape {list(tensor.shape)} there and {list(other.shape)} here"
    if is_class or base.on_hub is not None or not all(name.endswith(SAFETENSORS_ENDING) for name in base.weights):
        return ""
    there_bytes, here_bytes = map(_bytes, (weights, base.tensors))
    return "" if there_bytes == here_bytes else f"its weights have {there_bytes:,} bytes there and {here_bytes:,} here"


def _bytes(tensors: Sequence[StoredTensor]) -> int:
    """The size of the values, which does not depend on how they are split into files."""
    return sum(math.prod(tensor.shape) * DTYPE_BITS[tensor.dtype] for tensor in tensors) // 8
