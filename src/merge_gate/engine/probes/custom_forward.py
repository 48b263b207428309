"""Refuses layers whose class computes with its weight in its own way, so that a merge changes the result.

In: a `Base`, and an adapter loaded on its scratch copy, not merged yet. Out: nothing, or `Refused`. This module imports
no model's code: it tests each such layer by itself.

1. Find the layers of a class that has a `forward` of its own.
2. Run each of them alone in float32, with random inputs: plain, with the adapter, and merged.
3. Refuse if the merged result differs from the result with the adapter. A layer that does not run alone is accepted.
"""

# PEFT adds the delta to what a layer returns, and its merge adds the delta to the weight. Both are the same if the
# layer multiplies by its weight, or looks up its rows. Classes derived from torch's may standardize the weight first,
# normalize or scale what they return, or shift an index.
#
# Convolutions that pad with values other than zeros are not refused. PEFT pads its own part with zeros, so the results
# differ only within a kernel's width of the border, which matters less for larger inputs.

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from merge_gate.engine.adapter.load_adapter import ADAPTER_NAME, Loaded
from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.merge.private_copies import PrivateCopies, slots_of
from merge_gate.engine.tensors.quantized import is_quantized
from merge_gate.records.refusals import Refused
from merge_gate.tensor_names import ADAPTER_PREFIX

TORCH_LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""torch's layers that PEFT has layers for."""

MOST_ROWS = 64
"""The limit of an embedding's rows in the test, and the limit of trained tokens in addition."""

MOST_ERROR_SHARE = 0.01
"""The accepted error, as a share of what the adapter changes. PEFT's own layers have 1e-6."""

ROUNDING_SHARE = 1e-5
"""The accepted error, as a share of what the layer returns. float32 loses a delta that is close to zero."""


def refuse_other_merges(base: Base, loaded: Loaded) -> None:
    """Test the merge of each layer with a custom forward.

    Raises:
        Refused: for the first layer that a merge changes (`not-mergeable`).
    """
    if not any(map(_has_custom_forward, base.model.modules())):
        return
    for path, layer in loaded.model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or not _has_custom_forward(layer.get_base_layer()):
            continue
        error_share = _error_share(base, loaded, layer)
        if error_share > MOST_ERROR_SHARE:  # 3.
            name = path.removeprefix(ADAPTER_PREFIX).removesuffix(".token_adapter")
            class_name = type(layer.get_base_layer()).__name__
            raise Refused("other_forward", module=name, class_name=class_name, share=error_share)


def _has_custom_forward(layer: nn.Module) -> bool:
    """Step 1."""
    kind = next((kind for kind in TORCH_LAYERS if isinstance(layer, kind)), None)
    weight = layer._parameters.get("weight")  # not the attribute, which a parametrized layer computes
    if kind is None or (weight is not None and is_quantized(weight)):
        return False
    return type(layer).forward is not kind.forward or hasattr(layer, "parametrizations")


def _error_share(base: Base, loaded: Loaded, layer: Any) -> float:
    """Step 2: ‖merged − unmerged‖ of the outputs, as a share of what the adapter changes. 0.0 if it is unknown."""
    rng_state = torch.get_rng_state()
    try:
        with PrivateCopies(layer, slots_of(layer, loaded.slots), base, dtype=torch.float32):
            layer.eval()  # PEFT leaves a combined adapter in training mode, in which dropout is random
            inputs = _inputs(layer).to(base.device)
            plain, unmerged, again = layer.get_base_layer()(inputs), layer(inputs), layer(inputs)
            if not torch.allclose(unmerged, again, equal_nan=True):
                return 0.0  # the layer draws random numbers on each call, as PVeRA can
            layer.merge(safe_merge=False)
            merged = layer(inputs)
            change = max(_distance(unmerged, plain), _distance(merged, plain))
            error = _distance(merged, unmerged)
            return error / change if error > ROUNDING_SHARE * float(plain.norm()) else 0.0
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # the layer needs other inputs, or PEFT cannot merge it, which the walk reports
        return 0.0
    finally:
        torch.set_rng_state(rng_state)


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).norm())


def _inputs(layer: Any) -> Tensor:
    base_layer = layer.get_base_layer()
    if isinstance(base_layer, nn.Embedding):
        # Rows of the first half only: some classes shift the index, or compute it.
        rows = reversed(range(min(MOST_ROWS, max(1, base_layer.num_embeddings // 2))))
        return torch.tensor([[*rows, *_trained_tokens(layer)]])
    generator = torch.Generator().manual_seed(0)
    if isinstance(base_layer, nn.Linear):
        return torch.randn(1, 4, base_layer.in_features, generator=generator)
    sizes = [  # three times the reach of the kernel
        3 * (1 + step * (size - 1)) for size, step in zip(base_layer.kernel_size, base_layer.dilation, strict=True)
    ]
    return torch.randn(1, base_layer.in_channels, *sizes, generator=generator)


def _trained_tokens(layer: Any) -> Iterator[int]:
    yield from (getattr(layer, "token_indices", None) or {}).get(ADAPTER_NAME, ())[:MOST_ROWS]
