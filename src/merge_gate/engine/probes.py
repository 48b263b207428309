"""What a merge alone does not show: unread layers, and unused tensors of the file.

In: a `Base`, and an adapter loaded on its scratch copy, not merged yet. Out: `UnreadLayer`s and `FileTensor`s. Layers
are left unmerged. This module imports no model's code: it tests layers by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from merge_gate._internal.tensor_names import ADAPTER_PREFIX
from merge_gate.engine.adapter.load_adapter import Loaded
from merge_gate.engine.adapter.peft_config import starts_at_no_delta
from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.merge.merged_tensors import ROUNDING_SHARE
from merge_gate.engine.merge.private_copies import MergeTarget, private_copies, targets_of
from merge_gate.engine.merge.proof import same_random_numbers
from merge_gate.engine.merge.rounding_floor import rounding_share
from merge_gate.engine.tensors.measure import distance, same_bits
from merge_gate.engine.tensors.placement import device_of, raise_if_of_the_run
from merge_gate.engine.tensors.quantized import dequantized, is_quantized
from merge_gate.engine.tensors.watch import Watch
from merge_gate.records.measured import FileTensor, TensorStats, UnreadLayer
from merge_gate.records.terms import Quantization


def _outermost_layers(model: nn.Module, *, wrappers: bool = False) -> Iterator[tuple[str, Any]]:
    """(path, layer) of PEFT's layers, except layers inside another one, which merges them (MultiheadAttention).

    With `wrappers`, all wrappers of parameters count, although they nest.
    """
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    inside = {id(inner) for _, layer in layers for inner in layer.modules() if inner is not layer}
    for path, layer in layers:
        if id(layer) not in inside or (wrappers and type(layer).__name__ == "ParamWrapper"):
            yield path, layer


# --- unread layers -------------------------------------------------------------------------------------------------
#
# 1. If training starts without a delta, stop: there is nothing to find, and this costs no time.
# 2. Trace once for each base which layers the model reads directly (direct_reads.py).
# 3. Let PEFT merge only those layers, into float32 copies, and compare these with what the model reads unmerged.
#
# The model reads the weight of such a layer without calling the layer, so the layer gets no gradient and keeps its
# initial values. For most methods these are no delta, and nothing is lost. Others start with a delta: FourierFT's
# random spectrum, `init_lora_weights: false`, PiSSA's residual. Their merge gives the model a weight that it did not
# have during training.


def unread_layers(base: Base, loaded: Loaded) -> tuple[UnreadLayer, ...]:
    """The layers whose delta the model has only after the merge."""
    if starts_at_no_delta(loaded.config) or base.facts.quantization != Quantization.NONE:  # 1.
        return ()
    if base.direct_reads is None:  # 2.
        from merge_gate.engine.base.direct_reads import trace  # noqa: PLC0415 - an ordinary LoRA does not wait for it

        base.direct_reads = trace(base.model)
    reads = base.direct_reads
    unread = []
    for path_in_peft, layer in _outermost_layers(loaded.model):
        path = path_in_peft.removeprefix(ADAPTER_PREFIX)
        never_called = _is_attention_output(base.model, path)
        if path in reads.modules or (never_called and path.rpartition(".")[0] not in reads.ran):
            share = _delta_share(base, loaded, layer)  # 3.
            if share > max(rounding_share(layer), ROUNDING_SHARE):
                unread.append(
                    UnreadLayer(module=path, share=share, never_called=never_called, in_logits=path in reads.in_logits)
                )
    return tuple(unread)


def _is_attention_output(model: nn.Module, path: str) -> bool:
    """Whether it is the output layer of torch's own attention, which never calls it (nn/modules/activation.py)."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    return name == "out_proj" and type(owner).forward is nn.MultiheadAttention.forward


def _delta_share(base: Base, loaded: Loaded, layer: Any) -> float:
    """‖merged − unmerged‖/‖unmerged‖ of the layer's tensors. 0.0 if PEFT cannot merge it, which the merge reports."""
    targets = targets_of(layer, loaded.base_names)
    try:
        with same_random_numbers(), private_copies(layer, targets, base, dtype=torch.float32):
            unmerged = [target.data.to(device_of(layer, base.device), torch.float32, copy=True) for target in targets]
            _merge_on_trial(base, loaded, layer)
            pairs = [
                (target.tensor, old) for target, old in zip(targets, unmerged, strict=True) if target.tensor is not None
            ]
            delta = math.hypot(*(distance(tensor.data, old) for tensor, old in pairs))
            norm = math.hypot(*(distance(old) for _, old in pairs))
    except Exception as error:
        raise_if_of_the_run(error)
        return 0.0
    return delta / norm if norm and math.isfinite(delta) else 0.0


# --- unused tensors of the file ------------------------------------------------------------------------------------
#
# If a merge does not read a tensor that is not finite, the tensor is training state. The answer comes from merging: a
# table of names would be wrong in the next release of PEFT.


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
    except Exception as error:
        raise_if_of_the_run(error)
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
    name = loaded.base_names.get((id(loaded.model.get_submodule(module)), attribute), "")
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
    layers = list(_outermost_layers(model, wrappers=True))
    containing = [layer for path, layer in layers if key.startswith(f"{path}.")]
    if containing:
        return containing
    is_shared = key.count(".") <= 2 or not key.startswith(ADAPTER_PREFIX)  # noqa: PLR2004 - base_model.vera_A.default
    return [layer for _, layer in layers] if is_shared else []


def merged_once(base: Base, loaded: Loaded, layer: Any) -> list[torch.Tensor]:
    """A layer's parameters and buffers after a merge by PEFT. The layer stays unmerged."""
    targets = targets_of(layer, loaded.base_names)
    before = layer.get_base_layer()
    with private_copies(layer, targets, base):
        _merge_on_trial(base, loaded, layer)
        after = layer.get_base_layer()
        if after is before:
            return [_merged_values(target) for target in targets]
        try:  # the method replaces the whole module
            return [tensor.detach().clone() for tensor in (*after.parameters(), *after.buffers())]
        finally:
            layer.unmerge()


def _merge_on_trial(base: Base, loaded: Loaded, layer: Any) -> None:
    loaded.is_probed = True
    with Watch(loaded.memory(base), "merge"):
        layer.merge(safe_merge=False)


def _merged_values(target: MergeTarget) -> torch.Tensor:
    tensor = target.tensor
    assert tensor is not None  # noqa: S101 - a target is made of a parameter that exists
    return dequantized(target.module, tensor) if is_quantized(tensor) else tensor.detach().clone()
