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
from merge_gate.engine.base.model_class import current_names
from merge_gate.engine.base.tensor_map import NoMapError, TensorMap, tensor_map
from merge_gate.records.files import StoredTensor
from merge_gate.records.measured import AdaptedModule, ServedClass, ServedModule

_WEIGHT = ".weight"


def served_class(
    base: Base, stored: Sequence[StoredTensor], loaded_map: TensorMap | None, modules: Iterable[str], scalings: Any
) -> ServedClass:
    """The class that config.json names, and the modules of an adapter in it.

    `modules` are the names in the adapter's file, and `scalings` the factor of each loaded layer's delta.
    """
    model, loaded = base.model, type(base.model).__name__
    named = model.config.architectures or ()
    name = next((one for one in named if isinstance(one, str) and hasattr(transformers, one)), loaded)
    own: Mapping[str, str] = {}
    sources: Mapping[str, tuple[str, ...]] = loaded_map.sources if loaded_map is not None else {}
    if name != loaded:
        try:
            found = tensor_map(getattr(transformers, name), base.source.directory, stored)
        except NoMapError:
            return ServedClass(name=name, loaded=loaded)
        places = {made: _module(target) for target, made in found.sources.items() if target.endswith(_WEIGHT)}
        own = {_module(target): places[made] for target, made in sources.items() if made in places}
        model, sources = found.model, found.sources
    else:
        own = {path: path for path, _ in model.named_modules()}
    factors, adapted = dict(scalings), []
    for module in modules:
        path = module if module in factors else _module(*current_names(base.model, [module + _WEIGHT]))
        scaling, served = factors.get(path), own.get(path)
        if scaling is not None and served is not None:
            adapted.append(AdaptedModule(name=module, served=served, scaling=scaling))
    outlines = ((path, _sizes(module)) for path, module in model.named_modules())
    return ServedClass(
        name=name,
        loaded=loaded,
        adapted=tuple(adapted),
        modules=tuple(
            ServedModule(name=path, sizes=sizes, sources=sources.get(path + _WEIGHT, ())) for path, sizes in outlines
        ),
    )


def _module(tensor: str) -> str:
    return tensor.removesuffix(_WEIGHT)


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """The sizes of a layer's input and output."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (int(module.weight.shape[0]), int(module.weight.shape[1])) if isinstance(module, Conv1D) else None
