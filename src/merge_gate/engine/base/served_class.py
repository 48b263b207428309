"""The class that a base's config.json names, which servers load, and an adapter's modules by the names of that class.

In: a loaded base, its tensor map, and the names in an adapter's file. Out: `ServedClass`. Knows no PEFT, and no weight
is read: two modules are the same one if they are made of the same stored tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.base.model_class import current_names, named_class
from merge_gate.engine.base.tensor_map import NoMapError, TensorMap, tensor_map
from merge_gate.records.files import StoredTensor
from merge_gate.records.measured import ServedClass

_WEIGHT = ".weight"


def served_class(
    base: Base,
    stored: Sequence[StoredTensor],
    loaded_map: TensorMap | None,
    modules: Iterable[str],
    scalings: Mapping[str, float],
) -> ServedClass:
    """The class that config.json names. `modules` are in the adapter's file, and `scalings` are of loaded layers."""
    model: Any = base.model
    loaded = type(model).__name__
    name, sources = named_class(base.source.directory) or loaded, _of_modules(loaded_map)
    own = {path: path for path, _ in model.named_modules()}
    if name != loaded:
        try:
            found = tensor_map(getattr(transformers, name), base.source.directory, stored)
        except NoMapError:
            return ServedClass(name=name, loaded=loaded, names={}, scalings={}, sizes={}, sources={})
        places = {made: path for path, made in _of_modules(found).items()}
        own = {path: places[made] for path, made in sources.items() if made in places}
        model, sources = found.model, _of_modules(found)
    current = {
        one: one if one in scalings else current_names(base.model, [one + _WEIGHT])[0].removesuffix(_WEIGHT)
        for one in modules
    }
    known = {one: path for one, path in current.items() if path in scalings and path in own}
    return ServedClass(
        name=name,
        loaded=loaded,
        names={one: own[path] for one, path in known.items()},
        scalings={own[path]: scalings[path] for path in known.values()},
        sizes={path: _sizes(module) for path, module in model.named_modules()},
        sources=sources,
    )


def _of_modules(found: TensorMap | None) -> dict[str, tuple[str, ...]]:
    made = found.sources.items() if found is not None else ()
    return {name.removesuffix(_WEIGHT): sources for name, sources in made if name.endswith(_WEIGHT)}


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (int(module.weight.shape[0]), int(module.weight.shape[1])) if isinstance(module, Conv1D) else None
