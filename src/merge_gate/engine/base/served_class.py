"""The class that an adapter's users load (model_class.py), and the adapter's modules by the names of that class.

In: a loaded base with its tensor map, and names of modules. Out: `ServedClass`. Knows no PEFT, and no weight is read:
two modules are the same one if they are made of the same stored tensors, and their last names are equal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.base.model_class import current_names, users_class
from merge_gate.engine.base.tensor_map import NoMapError, TensorMap, tensor_map
from merge_gate.records.files import AdapterFiles
from merge_gate.records.measured import ServedClass


def served_class(
    base: Base, files: AdapterFiles, adapted: Mapping[str, str], scalings: Mapping[str, float], *, is_needed: bool
) -> ServedClass | None:
    """The class that users of an adapter load. Without `is_needed`, None unless it lacks names of the loaded class.

    Then the loaded class is that of a part of the base: the text model of a multimodal one. `adapted` are an adapter's
    modules by any of their names, with those in the loaded class. `scalings` has those of LoRA, by the latter.
    """
    loaded = type(base.model).__name__
    if base.named is None:
        base.named = _named(base, loaded, files, is_needed=is_needed)
    name, is_whole, mapping = base.named
    if not is_needed and (not is_whole or mapping is None):
        return None
    model: Any = mapping.model if mapping is not None else base.model
    own, sources = {path: path for path, _ in base.model.named_modules()}, _sources(mapping)
    if name != loaded:
        places = {(_last(path), made): path for path, made in sources.items()}
        keys = {path: (_last(path), made) for path, made in _sources(base.map).items()}
        own = {path: places[key] for path, key in keys.items() if key in places}
    names = {alias: own[path] for alias, path in adapted.items() if path in own}
    current = current_names(model, [f"{alias}.weight" for alias in names])
    lacking = [
        alias for alias, new in zip(names, current, strict=True) if names[alias] not in {alias, new[: -len(".weight")]}
    ]
    if not is_needed and not lacking:
        return None
    return ServedClass(
        name=name,
        loaded=loaded,
        is_whole=is_whole,
        names=names,
        lacking=tuple(lacking),
        scalings={own[path]: scaling for path, scaling in scalings.items() if path in own},
        sizes={path: _sizes(module) for path, module in model.named_modules()},
        sources=sources,
    )


def _named(base: Base, loaded: str, files: AdapterFiles, *, is_needed: bool) -> tuple[str, bool, TensorMap | None]:
    """The users' class, whether it is the whole base's while `loaded` is not, and its map, which has the names."""
    source, mapping = base.source, base.map
    code = source.trust_remote_code
    name, is_part = users_class(source.directory, type(base.model), files, trust_remote_code=code)
    if name != loaded and mapping is not None:
        stored, mapping = tuple(mapping.stored.values()), None
        with contextlib.suppress(NoMapError):
            if is_part or is_needed:
                mapping = tensor_map(getattr(transformers, name), source.directory, stored)
    return name, is_part and name != loaded, mapping


def _sources(mapping: TensorMap | None) -> dict[str, tuple[str, ...]]:
    """The stored tensors that make each module."""
    made: dict[str, set[str]] = {}
    for name, sources in mapping.sources.items() if mapping is not None else ():
        made.setdefault(name.rpartition(".")[0], set()).update(sources)
    return {path: tuple(sorted(sources)) for path, sources in made.items()}


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (int(module.weight.shape[0]), int(module.weight.shape[1])) if isinstance(module, Conv1D) else None
