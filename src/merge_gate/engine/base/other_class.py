"""A base in another class, over the tensors in memory, so that a fleet of heads reads the body once.

In: a loaded `Base`, and the `ModelClass` of another class or another number of labels. Out: a `Base` of that class over
the same memory, without copies. None if transformers could make another model: it is loaded from its files then. Knows
nothing of PEFT.

1. An outline of the class is loaded on torch's meta device. It has names, shapes, and dtypes, but no data.
2. transformers loads the class again, from the tensors in memory. Tensors that the first class lacks (another head)
   come from the files.
3. Both loads have to lack the same names and have the same shapes and dtypes. Tensors from memory have to be in the
   same place: a copied tensor was cast, and may have been rounded twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import get_checkpoint_shard_files

from merge_gate.engine.base.foreign_weights import refuse_foreign_weights
from merge_gate.engine.base.loaded_base import (
    Base,
    Loading,
    ModelClass,
    head_options,
    load_with_info,
    loads_as_usual,
    measure_base,
    named_tensors,
    outlines,
    place_of,
    refuse_mismatches,
)
from merge_gate.records.terms import Quantization


def in_another_class(known: Base, model_class: ModelClass) -> Base | None:
    """The base in another class.

    Args:
        known: the loaded base. It stays unchanged, and may be released: its tensors stay.
        model_class: the other class or number of labels.
    """
    transformers_class = getattr(transformers, model_class.class_name)
    if known.facts.quantization != Quantization.NONE or known.feed is not None:
        return None  # a skeleton of the other class takes no memory either
    if not loads_as_usual(transformers_class):
        return None
    try:
        model, loading = _built(known, transformers_class, model_class)
    except Exception:  # the load from files reports what is wrong
        return None
    if model is None:
        return None
    stats = {place_of(tensor): known.stats[name] for name, tensor in known.tensors.items() if tensor.numel()}
    shared = measure_base(model, known.source, loading, known=stats, hollow=known.hollow)
    return None if shared.was_misread() else shared


def _built(known: Base, transformers_class: Any, model_class: ModelClass) -> tuple[Any, Loading]:
    # 1.
    directory, on_meta = known.source.directory, {"device_map": "meta"}
    outline, expected = load_with_info(
        transformers_class, directory, **known.source.options, **head_options(model_class), **on_meta
    )
    refuse_mismatches(expected, known.source.label, model_class)
    refuse_foreign_weights(outline, expected.newly_initialized, known.source.label)
    # 2.
    config = outline.config
    held = {name: tensor.detach() for name, tensor in known.tensors.items() if name not in known.newly_initialized}
    again: dict[str, Any] = {"config": config, "dtype": config.dtype, "state_dict": held}
    lacking = (
        load_with_info(transformers_class, None, **again, **on_meta)[1].newly_initialized - expected.newly_initialized
    )
    held |= dict(_stored(Path(directory), lacking, outline.base_model_prefix))
    model, loading = load_with_info(transformers_class, None, **again)
    # 3.
    places = {place_of(tensor) for tensor in known.tensors.values()}
    found = {name: tensor for name, _, tensor in named_tensors(model)}
    newly_placed = {name for name, tensor in found.items() if place_of(tensor) not in places}
    is_same = (
        loading.newly_initialized == expected.newly_initialized
        and newly_placed <= expected.newly_initialized | lacking
        and outlines(found) == outlines({name: tensor for name, _, tensor in named_tensors(outline)})
    )
    return (model if is_same else None), expected


def _stored(directory: Path, lacking: frozenset[str], prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors from the files with these names, with or without the prefix of the body. They are mapped, not read."""
    if not lacking:
        return
    names = {other for name in lacking for other in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))}
    for path in _files(directory):
        with safe_open(path, framework="pt") as file:
            for name in sorted(names.intersection(file.keys())):
                yield name, file.get_tensor(name)


def stored_names(directory: Path) -> set[str]:
    """The names of the tensors in the base's files."""
    names: set[str] = set()
    for path in _files(directory):
        with safe_open(path, framework="pt") as file:
            names.update(file.keys())
    return names


def _files(directory: Path) -> list[Path]:
    """The files that transformers loads: those in config.json, else one file, else the shards of an index."""
    named = json.loads((directory / "config.json").read_bytes()).get("transformers_weights")
    whole = directory / SAFE_WEIGHTS_NAME
    if named is None and whole.exists():
        named = SAFE_WEIGHTS_NAME
    index = named or SAFE_WEIGHTS_INDEX_NAME
    if not index.endswith(".json"):
        return [directory / index]
    shards, _ = get_checkpoint_shard_files(str(directory), str(directory / index))
    return [Path(shard) for shard in shards]
