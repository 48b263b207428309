"""Finds out if a merge reads a tensor of the adapter's file that is not finite. If not, the tensor is training state.

In: an adapter on its scratch copy, and the measured tensors of its file. Out: `FileTensor`s. The answer comes from
merging. A table of names would be wrong in the next release of PEFT.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from merge_gate.engine.adapter.load_adapter import Loaded
from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.merge.private_copies import PrivateCopies, Slot, slots_of
from merge_gate.engine.tensors.measure import same_bits
from merge_gate.engine.tensors.quantized import dequantized, is_quantized
from merge_gate.records.measured import FileTensor, TensorStats
from merge_gate.tensor_names import ADAPTER_PREFIX


def mark_used(base: Base, loaded: Loaded, measured: Iterable[TensorStats]) -> tuple[FileTensor, ...]:
    """Mark each tensor of the file as used or not. A finite tensor counts as used without a test."""
    unexpected = {name for arrival in loaded.arrivals for name in (*arrival.unexpected, *arrival.duplicates)}
    model_keys = {name: key for arrival in loaded.arrivals for name, key in arrival.model_key.items()}

    def is_used(stats: TensorStats) -> bool:
        if stats.finite or stats.name not in model_keys:
            return stats.finite or stats.name not in unexpected
        return _is_used(base, loaded, model_keys[stats.name])

    return tuple(FileTensor(stats=stats, used=is_used(stats)) for stats in measured)


def _is_used(base: Base, loaded: Loaded, key: str) -> bool:
    """Whether a merge reads the tensor that was loaded under `key`: other values in it give other merged values.

    1. Make every other tensor finite, and merge the layers that the tensor can affect, with two finite contents of it.
    2. Merge them again with the tensor as it is.
    3. The tensor is used if the first two results differ, or the third is not finite.
    """
    layers = _affected_layers(loaded.model, key)
    if not layers:  # a trained module or a tensor of the base is itself the merged value
        return not _is_replaced(loaded, key)
    finite = {name: _made_finite(_real_part(tensor)) for name, tensor in loaded.state.items() if _is_floating(tensor)}
    noise = torch.rand(finite[key].shape, generator=torch.Generator().manual_seed(1)).to(finite[key].dtype)
    results = []
    try:
        for tensor in (finite[key], finite[key] * 2 + noise, loaded.state[key]):  # 1. and 2.
            loaded.model.load_state_dict({**finite, key: tensor}, strict=False)
            results.append([merged_once(base, loaded, layer) for layer in layers])
    except Exception:
        return True
    finally:
        loaded.model.load_state_dict(loaded.state, strict=False)
    return any(  # 3.
        not torch.isfinite(actual).all() or not same_bits(first, second)
        for of_layer in zip(*results, strict=True)
        for first, second, actual in zip(*of_layer, strict=True)
    )


def _is_replaced(loaded: Loaded, key: str) -> bool:
    """Whether the merged model has a trained module instead of the tensor's own, and of all modules that share it."""
    path, _, inside = key.rpartition(".original_module.")
    if not inside or not _is_trained(loaded, path):
        return False
    module, _, attribute = key.rpartition(".")
    name = loaded.slots.get((id(loaded.model.get_submodule(module)), attribute), "")
    return all(_is_trained(loaded, f"{ADAPTER_PREFIX}{other}") for other in loaded.tied_modules.get(name, ()))


def _is_trained(loaded: Loaded, path: str) -> bool:
    return isinstance(loaded.model.get_submodule(path), ModulesToSaveWrapper)


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _real_part(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a complex tensor that PEFT loads."""
    return tensor.real if tensor.is_complex() else tensor


def _made_finite(tensor: torch.Tensor) -> torch.Tensor:
    """With 0.5 for NaN and infinities. 8-bit dtypes become float32, because torch has no arithmetic for them."""
    return torch.nan_to_num(tensor.float() if tensor.element_size() == 1 else tensor, 0.5, 0.5, 0.5)


def _affected_layers(model: Any, key: str) -> list[Any]:
    """The outermost tuner layers that contain the key. For a tensor that all layers share, all of them."""
    layers = list(_outermost_layers(model))
    containing = [layer for path, layer in layers if key.startswith(f"{path}.")]
    if containing:
        return containing
    is_shared = key.count(".") <= 2 or not key.startswith(ADAPTER_PREFIX)  # noqa: PLR2004 - base_model.vera_A.default
    return [layer for _, layer in layers] if is_shared else []


def _outermost_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, layer) of PEFT's layers, except layers inside another one. Wrappers of parameters nest, and all count."""
    outermost: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if any(path.startswith(f"{outer}.") for outer in outermost) and type(module).__name__ != "ParamWrapper":
            continue
        outermost.append(path)
        yield path, module


def merged_once(base: Base, loaded: Loaded, layer: Any) -> list[torch.Tensor]:
    """A layer's parameters and buffers after a merge by PEFT. The layer stays unmerged."""
    slots = slots_of(layer, loaded.slots)
    before = layer.get_base_layer()
    with PrivateCopies(layer, slots, base):
        layer.merge(safe_merge=False)
        after = layer.get_base_layer()
        if after is before:
            return [_merged_values(slot) for slot in slots]
        try:  # the method replaces the whole module
            return [tensor.detach().clone() for tensor in (*after.parameters(), *after.buffers())]
        finally:
            layer.unmerge()


def _merged_values(slot: Slot) -> torch.Tensor:
    tensor = slot.tensor
    assert tensor is not None  # noqa: S101 - a slot is made of a parameter that exists
    return dequantized(slot.module, tensor) if is_quantized(tensor) else tensor.detach().clone()
