"""What each place of the model has to hold: before the first merge, during the merges, and in the final model.

In: an adapter loaded on its scratch copy. Out: the names of places, and of layers, that hold something else than the
base, the adapter's file, PEFT's injection, or the merge of their layer has for them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from merge_gate.engine.adapter.load_adapter import ADAPTER_NAME, Loaded, has_values
from merge_gate.engine.adapter.places import adapter_tensors, has_bits_of_base, is_of_base, places_of, settings_of
from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.merge.private_copies import MergeTarget
from merge_gate.engine.tensors.measure import same_bits, shares_storage
from merge_gate.engine.tensors.quantized import is_quantized, with_scales
from merge_gate.engine.tensors.watch import Memory


class Places:
    """The places of the unloaded model before the merge, and the `memory` that must not change.

    That is the memory of the base, and of the tensors that the load and merged layers have left. The plan of a merge
    adds the factors of layers that go in blocks.
    `layers` are PEFT's layers on the way to these places, by path.
    """

    def __init__(self, base: Base, loaded: Loaded) -> None:
        self._base, self._loaded = base, loaded
        places = list(places_of(loaded.model.get_base_model()))
        self._others = [place for place in places if place.is_saved and not is_of_base(base, place)]
        self._before = {place.name: (place.tensor, place.tensor.data) for place in places}
        self._held = {id(parameter): data for parameter, data in self._before.values()}
        self.layers = list({id(layer): (path, layer) for place in places for path, layer in place.layers}.values())
        self._settings = {
            id(module): loaded.injected.settings.get(path, {})
            for path, module in loaded.model.named_modules()
            if isinstance(module, BaseTunerLayer)
        }
        parts = ((place.name, part) for place in self._others for part in with_scales(place.module, place.tensor))
        self.memory = Memory(parts, base.memory)

    @functools.cached_property
    def _values(self) -> dict[int, torch.Tensor]:
        return self._loaded.values()

    def changed(self) -> Iterator[str]:
        """The names of places that have neither the base's memory, the file's values, nor what the injection left."""
        own, of_file = self._loaded.injected.own, self._loaded.of_file() if self._others else set[int]()
        for place in self._others:
            left = own.get(place.name)
            is_left = left is not None and shares_storage(left, place.tensor)
            if not is_left and id(place.tensor) not in of_file and not has_bits_of_base(self._base, place):
                yield place.name

    def inactive_copies(self) -> Iterator[str]:
        """The paths of modules whose trained copy PEFT would leave out of its result."""
        for path, module in self._loaded.model.get_base_model().named_modules():
            is_wrapper = isinstance(module, ModulesToSaveWrapper) and ADAPTER_NAME in module.modules_to_save
            if is_wrapper and ADAPTER_NAME not in module.active_adapters:
                yield path

    def has_other_settings(self, layer: Any) -> bool:
        """Whether a layer's strength, trained tokens, or variant is not what the injection has left."""
        inner = (module for module in layer.modules() if isinstance(module, BaseTunerLayer))
        return any(self._settings.get(id(module)) != settings_of(module) for module in inner)

    def has_other_factors(self, layer: Any) -> bool:
        """Whether a tensor of the adapter in a layer has other values than the file, or than the injection gave it.

        PEFT may put equal values in the place of factors in 16 bits. A run of constrained OFT projects its rotations.
        """
        first = self._loaded.injected.first
        projections = {id(module.weight): module for module in layer.modules() if getattr(module, "coft", False)}
        if isinstance(layer, AdaLoraLayer) and not layer.lora_E[ADAPTER_NAME].numel():
            return False  # the load leaves nothing of a pruned layer
        for holder, tensor in adapter_tensors(layer):
            value = self._values.get(id(tensor))
            if value is not None:
                is_right = has_values(tensor, value) or _is_projected(projections.get(id(tensor)), tensor, value)
            else:
                is_right = first is None or (holder in first and same_bits(first[holder].to(tensor.device), tensor))
            if not is_right:
                return True
        return False

    def is_moved(self, target: MergeTarget) -> bool:
        """Whether the place holds another tensor than before the merge, or than an earlier layer has left there."""
        known = self._held.get(self._key(target))
        return known is None or not shares_storage(known, target.data)

    def leave(self, target: MergeTarget, tensor: torch.Tensor) -> None:
        """Note that a layer's merge has left this tensor in its place, and in all places that share the tensor."""
        self._held[self._key(target)] = tensor.data
        self.memory.protect(target.name, *with_scales(target.module, tensor))

    def replace(self, name: str, tensor: torch.Tensor) -> bool:
        """Note that a layer's merge has put another module in its place, which has this tensor under the name.

        False if it has other values than the file.
        """
        parameter, _ = self._before.get(name, (tensor, None))
        self._held[id(parameter)] = tensor.data
        self.memory.protect(name, tensor.data)
        value = self._values.get(id(tensor))
        return value is None or has_values(tensor, value)

    def _key(self, target: MergeTarget) -> int:
        """PEFT's attention makes new parameters over the same memory, so they are identified by name."""
        known, _ = self._before.get(target.name, (target.parameter, None))
        return id(target.parameter) if id(target.parameter) in self._held else id(known)

    def wrong(self, merged: nn.Module, named: Mapping[str, torch.Tensor]) -> Iterator[str]:
        """The names in PEFT's result that hold a wrong tensor or wrong scales."""
        for name, tensor in named.items():
            parameter, _ = self._before.get(name, (tensor, None))
            known = self._held.get(id(parameter))
            held_scales = with_scales(merged.get_submodule(name.rpartition(".")[0]), tensor)[1:]
            is_left = known is not None and (shares_storage(known, tensor) or self._is_copy(name, known, tensor))
            if not is_left or any(self.memory.name_of(scale) != name for scale in held_scales):
                yield name

    def _is_copy(self, name: str, known: torch.Tensor, tensor: torch.Tensor) -> bool:
        if is_quantized(known) or is_quantized(tensor):
            return False
        first = self._base.first_name(name)
        with self._base.filled([first] if first in self._base.tensors else []):
            return same_bits(known, tensor.to(known.device))


MOST_PROJECTION_UNITS = 64
"""Units of the largest value. Each run of the layer projects again, and rounds."""


@torch.no_grad()
def _is_projected(module: Any, tensor: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a tensor is PEFT's projection of the file's value onto the constraint of OFT, within rounding."""
    if module is None or tensor.shape != value.shape:
        return False
    projected = module._project_batch(value.to(tensor.device, tensor.dtype), eps=module.eps)
    room = MOST_PROJECTION_UNITS * torch.finfo(tensor.dtype).eps * float(projected.abs().nan_to_num().max())
    return torch.allclose(tensor, projected, rtol=0.0, atol=room, equal_nan=True)
