"""Finds layers of an adapter that have no effect until they are merged, because the model never calls them.

In: a `Base`, and an adapter loaded on its scratch copy, not merged yet. Out: `UnreadLayer`s. This module imports
nothing of judging.

1. If training starts without a delta, stop: there is nothing to find, and this costs no time.
2. Trace once for each base which layers the model reads directly (direct_reads.py).
3. Let PEFT merge only those layers, into float32 copies, and compare these with what the model reads unmerged.
"""

# The model reads the weight of such a layer without calling the layer, so the layer gets no gradient and keeps its
# initial values. For most methods these are no delta, and nothing is lost. Others start with a delta: FourierFT's
# random spectrum, `init_lora_weights: false`, PiSSA's residual. Their merge gives the model a weight that it did not
# have during training.

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
    if starts_at_no_delta(loaded.config) or base.facts.quantization != Quantization.NONE:  # 1.
        return ()
    if base.direct_reads is None:  # 2.
        from merge_gate.engine.base.direct_reads import trace  # noqa: PLC0415 - an ordinary LoRA does not wait for it

        base.direct_reads = trace(base.model)
    reads = base.direct_reads
    unread = []
    for path, layer in _outermost_layers(loaded.model):
        never_called = _is_attention_output(base.model, path)
        if path in reads.modules or (never_called and path.rpartition(".")[0] not in reads.ran):
            share = _delta_share(base, loaded, layer)  # 3.
            if share > max(rounding_share(layer), ROUNDING_SHARE):
                unread.append(
                    UnreadLayer(module=path, share=share, never_called=never_called, in_logits=path in reads.in_logits)
                )
    return tuple(unread)


def _outermost_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """PEFT's layers by the base's names, except layers inside another one, which merges them (MultiheadAttention)."""
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    inside = {id(inner) for _, layer in layers for inner in layer.modules() if inner is not layer}
    return ((path.removeprefix(ADAPTER_PREFIX), layer) for path, layer in layers if id(layer) not in inside)


def _is_attention_output(model: nn.Module, path: str) -> bool:
    """Whether it is the output layer of torch's own attention, which never calls it (nn/modules/activation.py)."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    return name == "out_proj" and type(owner).forward is nn.MultiheadAttention.forward


def _delta_share(base: Base, loaded: Loaded, layer: Any) -> float:
    """‖merged − unmerged‖/‖unmerged‖ of the layer's tensors. 0.0 if PEFT cannot merge it, which the walk reports."""
    slots = slots_of(layer, loaded.slots)
    rng_state = torch.get_rng_state()
    try:
        with PrivateCopies(layer, slots, base, dtype=torch.float32):
            unmerged = [slot.data.to(base.device, torch.float32, copy=True) for slot in slots]
            layer.merge(safe_merge=False)
            pairs = [(slot.tensor, old) for slot, old in zip(slots, unmerged, strict=True) if slot.tensor is not None]
            delta = math.hypot(*(distance(tensor.data, old) for tensor, old in pairs))
            norm = math.hypot(*(distance(old) for _, old in pairs))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:
        return 0.0
    finally:
        torch.set_rng_state(rng_state)
    return delta / norm if norm and math.isfinite(delta) else 0.0
