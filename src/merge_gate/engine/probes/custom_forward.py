"""Layers whose class computes with its weight in its own way, so that a merge gives another layer.

In: a `Base`, and an adapter loaded on its scratch, not merged yet. Out: nothing, or `Refused`. Knows no class by name.

PEFT adds its part to what a layer returns, and its merge adds to the weight. Both are the same where the layer
multiplies by its weight, or looks rows of it up. Classes derived from torch's may standardise the weight first, norm or
scale what they return, or shift an index. So PEFT is asked: such a layer alone is run on an input of its own, as it is
and merged, in float32. One that does not run so is left alone.

Not meant are convolutions that pad with something else than zeros. PEFT pads its own part with zeros, so both differ
within a kernel of the border, and by the less the larger the input is.
"""

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
from merge_gate.errors import Refused
from merge_gate.records.refusals import OtherForward
from merge_gate.tensor_names import ADAPTER_PREFIX

PLAIN = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers of torch's that PEFT has layers for."""

ROWS = 64
"""Rows of an embedding that are looked up, and trained tokens besides."""

OFF_SHARE = 0.01
"""So much of what the adapter changes may be computed otherwise; PEFT's own layers agree to 1e-6."""

ROUNDING_SHARE = 1e-5
"""And so much of what the layer returns: a delta next to nothing is lost in float32."""


def refuse_other_merges(base: Base, loaded: Loaded) -> None:
    """Hold each layer of a class of its own against its merge.

    Raises:
        Refused: with the first that PEFT merges into another one (`not-mergeable`).
    """
    if not any(map(_is_of_its_own, base.model.modules())):
        return
    for path, layer in loaded.model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or not _is_of_its_own(layer.get_base_layer()):
            continue
        off = _off(base, loaded, layer)
        if off > OFF_SHARE:
            name = path.removeprefix(ADAPTER_PREFIX).removesuffix(".token_adapter")
            raise Refused(OtherForward(module=name, class_name=type(layer.get_base_layer()).__name__, share=off))


def _is_of_its_own(layer: nn.Module) -> bool:
    kind = next((kind for kind in PLAIN if isinstance(layer, kind)), None)
    weight = layer._parameters.get("weight")  # a parametrised one would be computed
    if kind is None or (weight is not None and is_quantized(weight)):
        return False
    return type(layer).forward is not kind.forward or hasattr(layer, "parametrizations")


def _off(base: Base, loaded: Loaded, layer: Any) -> float:
    """‖merged − unmerged‖ of what the layer returns, as a share of what the adapter changes; 0.0 if unknown."""
    drawn = torch.get_rng_state()
    try:
        with PrivateCopies(layer, slots_of(layer, loaded.slots), base, dtype=torch.float32):
            layer.eval()  # what PEFT has combined is as in training: its dropout draws
            given = _input(layer).to(base.device)
            plain, unmerged, again = layer.get_base_layer()(given), layer(given), layer(given)
            if not torch.allclose(unmerged, again, equal_nan=True):
                return 0.0  # it draws whenever it is called, as PVeRA can
            layer.merge(safe_merge=False)
            merged = layer(given)
            changed = max(_distance(unmerged, plain), _distance(merged, plain))
            off = _distance(merged, unmerged)
            return off / changed if off > ROUNDING_SHARE * float(plain.norm()) else 0.0
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # it wants more than one input, or another one; or PEFT cannot merge it, which the walk says
        return 0.0
    finally:
        torch.set_rng_state(drawn)


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm())


def _input(layer: Any) -> Tensor:
    base_layer = layer.get_base_layer()
    if isinstance(base_layer, nn.Embedding):  # the first half: some classes shift the index, or count for themselves
        rows = reversed(range(min(ROWS, max(1, base_layer.num_embeddings // 2))))
        return torch.tensor([[*rows, *_tokens(layer)]])
    generator = torch.Generator().manual_seed(0)
    if isinstance(base_layer, nn.Linear):
        return torch.randn(1, 4, base_layer.in_features, generator=generator)
    sizes = [
        3 * (1 + step * (size - 1)) for size, step in zip(base_layer.kernel_size, base_layer.dilation, strict=True)
    ]
    return torch.randn(1, base_layer.in_channels, *sizes, generator=generator)


def _tokens(layer: Any) -> Iterator[int]:
    yield from (getattr(layer, "token_indices", None) or {}).get(ADAPTER_NAME, ())[:ROWS]
