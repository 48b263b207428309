"""Layers of an adapter that do nothing until they are merged, since the model reads their weight without calling them.

In: a `Base`, and an adapter loaded on its scratch, not merged yet. Out: `UnreadLayer`s. Judges nothing.

Such a layer gets no gradient, so it stays as training began: at no delta, for most methods, and then nothing is lost.
Where it begins at another place (FourierFT's random spectrum, `init_lora_weights: false`, PiSSA's residual), the merge
gives the model a weight that it never had while it was trained.

1. What begins at no delta is left alone: nothing is looked at, and nothing is paid.
2. What the model reads apart is traced, once for a base (direct_reads.py).
3. PEFT merges those layers alone, into float32 copies, which are compared with what the model reads unmerged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from merge_gate.engine.adapter.load_adapter import Loaded
from merge_gate.engine.adapter.peft_config import starts_at_no_delta
from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.merge.private_copies import PrivateCopies, slots_of
from merge_gate.engine.merge.rounding_floor import rounding_share
from merge_gate.engine.merge.tensor_result import ROUNDING_SHARE
from merge_gate.engine.tensors.measure import distance
from merge_gate.records.measured import UnreadLayer
from merge_gate.records.terms import Quantization
from merge_gate.tensor_names import ADAPTER_PREFIX


def unread_layers(base: Base, loaded: Loaded) -> tuple[UnreadLayer, ...]:
    """The layers whose delta the model has only after the merge."""
    if starts_at_no_delta(loaded.config) or base.facts.quantization != Quantization.NONE:
        return ()
    if base.direct_reads is None:
        from merge_gate.engine.base.direct_reads import trace  # noqa: PLC0415 - an ordinary LoRA does not wait for it

        base.direct_reads = trace(base.model)
    reads = base.direct_reads
    found = []
    for path, layer in _layers(loaded.model):
        never_called = _is_attention_output(base.model, path)
        if path in reads.modules or (never_called and path.rpartition(".")[0] not in reads.ran):
            share = _share(base, loaded, layer)
            if share > max(rounding_share(layer), ROUNDING_SHARE):
                found.append(
                    UnreadLayer(module=path, share=share, never_called=never_called, in_logits=path in reads.in_logits)
                )
    return tuple(found)


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """PEFT's layers by the base's names, but for those inside another one, which sees to them (MultiheadAttention)."""
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    inside = {id(inner) for _, layer in found for inner in layer.modules() if inner is not layer}
    return ((path.removeprefix(ADAPTER_PREFIX), layer) for path, layer in found if id(layer) not in inside)


def _is_attention_output(model: nn.Module, path: str) -> bool:
    """Whether it is the output of torch's own attention, which never calls it (torch/nn/modules/activation.py)."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    return name == "out_proj" and type(owner).forward is nn.MultiheadAttention.forward


def _share(base: Base, loaded: Loaded, layer: Any) -> float:
    """‖merged − read‖/‖read‖ of the layer's tensors; 0.0 where PEFT cannot merge it, which the walk says."""
    slots = slots_of(layer, loaded.slots)
    drawn = torch.get_rng_state()
    try:
        with PrivateCopies(layer, slots, base, dtype=torch.float32):
            read = [slot.data.to(base.device, torch.float32, copy=True) for slot in slots]
            layer.merge(safe_merge=False)
            pairs = [(slot.tensor, was) for slot, was in zip(slots, read, strict=True) if slot.tensor is not None]
            delta = math.hypot(*(distance(tensor.data, was) for tensor, was in pairs))
            norm = math.hypot(*(distance(was) for _, was in pairs))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:
        return 0.0
    finally:
        torch.set_rng_state(drawn)
    return delta / norm if norm and math.isfinite(delta) else 0.0
