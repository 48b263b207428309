"""Whether the merge reads a tensor of the adapter's file that is not finite: else it is training state, a warning.

In: an adapter on its scratch, and the measured tensors of its file. Out: `FileTensor`s. Decided by merging, not by a
table of names, which would be wrong with the next PEFT.
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


def with_use(base: Base, loaded: Loaded, measured: Iterable[TensorStats]) -> tuple[FileTensor, ...]:
    """Say of each tensor whether the merge reads it; of a finite one that is not asked."""
    unexpected = {name for arrival in loaded.arrivals for name in (*arrival.unexpected, *arrival.duplicates)}
    keys = {name: key for arrival in loaded.arrivals for name, key in arrival.model_key.items()}

    def used(stats: TensorStats) -> bool:
        if stats.finite or stats.name not in keys:
            return stats.finite or stats.name not in unexpected
        return _is_used(base, loaded, keys[stats.name])

    return tuple(FileTensor(stats=stats, used=used(stats)) for stats in measured)


def _is_used(base: Base, loaded: Loaded, key: str) -> bool:
    """Whether a merge reads the tensor that was loaded under `key`: other values there, other merged values.

    The tensor is loaded with two different finite contents, with every other non-finite tensor made finite, and the
    layers it can reach are merged into private copies each time. Last it is loaded as it is.
    """
    layers = _reached(loaded.model, key)
    if not layers:  # a trained module or a tensor of the base: it is the merged value
        return not _is_replaced(loaded, key)
    finite = {name: _made_finite(_real(value)) for name, value in loaded.state.items() if _numbers(value)}
    noise = torch.rand(finite[key].shape, generator=torch.Generator().manual_seed(1)).to(finite[key].dtype)
    results = []
    try:
        for value in (finite[key], finite[key] * 2 + noise, loaded.state[key]):
            loaded.model.load_state_dict({**finite, key: value}, strict=False)
            results.append([merged_once(base, loaded, layer) for layer in layers])
    except Exception:
        return True
    finally:
        loaded.model.load_state_dict(loaded.state, strict=False)
    first, second, actual = results
    return any(
        not torch.isfinite(broken).all() or not same_bits(one, other)
        for left, right, bad in zip(first, second, actual, strict=True)
        for one, other, broken in zip(left, right, bad, strict=True)
    )


def _is_replaced(loaded: Loaded, key: str) -> bool:
    """Whether a trained module stands in this one's place in the merged model, and in that of all that share it."""
    path, _, inside = key.rpartition(".original_module.")
    if not inside or not _is_trained(loaded, path):
        return False
    place, _, attribute = key.rpartition(".")
    name = loaded.slots.get((id(loaded.model.get_submodule(place)), attribute), "")
    return all(_is_trained(loaded, f"{ADAPTER_PREFIX}{other}") for other in loaded.sharers.get(name, ()))


def _is_trained(loaded: Loaded, path: str) -> bool:
    return isinstance(loaded.model.get_submodule(path), ModulesToSaveWrapper)


def _numbers(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _real(value: torch.Tensor) -> torch.Tensor:
    """What is loaded of a complex tensor."""
    return value.real if value.is_complex() else value


def _made_finite(value: torch.Tensor) -> torch.Tensor:
    """In float32 where the dtype is narrower than 16 bits: torch has no arithmetic for those."""
    return torch.nan_to_num(value.float() if value.element_size() == 1 else value, 0.5, 0.5, 0.5)


def _reached(model: Any, key: str) -> list[Any]:
    """The outermost tuner layers that hold the key; for a tensor shared by the whole model, all of them."""
    layers = list(_outermost(model))
    own = [layer for path, layer in layers if key.startswith(f"{path}.")]
    if own:
        return own
    shared = key.count(".") <= 2 or not key.startswith(ADAPTER_PREFIX)  # noqa: PLR2004 - base_model.vera_A.default
    return [layer for _, layer in layers] if shared else []


def _outermost(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, layer) of PEFT's layers that are not inside another one, but for wrappers of parameters, which nest."""
    inside: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if any(path.startswith(f"{outer}.") for outer in inside) and type(module).__name__ != "ParamWrapper":
            continue
        inside.append(path)
        yield path, module


def merged_once(base: Base, loaded: Loaded, layer: Any) -> list[torch.Tensor]:
    """What a layer's parameters and buffers become when PEFT merges it; nothing is kept."""
    slots = slots_of(layer, loaded.slots)
    before = layer.get_base_layer()
    with PrivateCopies(layer, slots, base):
        layer.merge(safe_merge=False)
        after = layer.get_base_layer()
        if after is before:
            return [_values(slot) for slot in slots]
        try:  # the method swaps the whole module in
            return [tensor.detach().clone() for tensor in (*after.parameters(), *after.buffers())]
        finally:
            layer.unmerge()


def _values(slot: Slot) -> torch.Tensor:
    tensor = slot.tensor
    assert tensor is not None  # noqa: S101 - a slot is made of a parameter that exists
    return dequantized(slot.module, tensor) if is_quantized(tensor) else tensor.detach().clone()
