"""The proof of a merge: the merged layer computes what the layer computes with its adapter, on the same input.

In: a tuner layer over float32 copies of its tensors, before its merge by PEFT and after it. Out: `LayerDifference`.

1. Make two inputs from the shapes of the base's layer. Each class of `_inputs` has its own kind of input.
2. Run the base's layer, and the layer with its adapter. What does not run alone, or draws random numbers, is not
   compared. Values that are not finite do not count.
3. Run the merged layer, and compare. The input on which the two differ less counts.

A merge that PEFT makes right differs by the rounding of float32, which is at most 4.4e-7 of the output. A wrong one
differs by a part of what the adapter changes: 10 % for a scale that is 10 % off. So a layer differs if it exceeds both
limits.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from merge_gate.engine.adapter.load_adapter import ADAPTER_NAME
from merge_gate.engine.tensors.placement import raise_if_of_the_run, random_states, restore_random
from merge_gate.records.measured import LayerDifference

MOST_ERROR_SHARE = 0.01
"""The accepted error, as a share of what the adapter changes. PEFT's own layers have 1.5e-4 at most."""

LOST_SHARE = 1e-5
"""The accepted error, as a share of what the layer returns. float32 loses a delta that is close to zero."""

MOST_ROWS = 64
"""The limit of an embedding's rows in an input, and the limit of trained tokens in addition."""

MOST_VALUES = 1 << 26
"""The limit of values that a convolution takes or returns: 256 MiB. Its configuration can name any reach."""

TINY = torch.finfo(torch.float32).tiny


def difference(one: LayerDifference) -> float:
    """The error as a share of what the adapter changes, or of a thousandth of the output if that is more."""
    return min(one.change_share, one.output_share * MOST_ERROR_SHARE / LOST_SHARE)


def differs(one: LayerDifference) -> bool:
    return difference(one) > MOST_ERROR_SHARE


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """The block draws from torch's generators, and later code does not notice."""
    states = random_states()
    try:
        yield
    finally:
        restore_random(states)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmerged:
    """The `inputs` of a layer, and what it returned for them: without its adapter, and with it."""

    inputs: list[tuple[Tensor, ...]]
    plain: list[Tensor]
    adapted: list[Tensor]

    def compared(self, module: str, class_name: str, merged: nn.Module) -> LayerDifference | None:
        """Step 3. None if the adapter changes nothing, or if only the merged layer returns NaN or an infinity.

        Such a merge is measured anyway.
        """
        try:
            outputs = [_run(merged, given) for given in self.inputs]
            shares = [_shares(*three) for three in zip(self.plain, self.adapted, outputs, strict=True)]
        except Exception as error:
            raise_if_of_the_run(error)
            if "DefaultCPUAllocator" in str(error):  # what torch raises if there is no memory
                raise
            shares = [(math.inf, math.inf)]
        found = [
            LayerDifference(module=module, class_name=class_name, change_share=change, output_share=output)
            for change, output in shares
        ]
        return None if any(math.isnan(difference(one)) for one in found) else min(found, key=difference)


def unmerged(layer: Any, device: torch.device) -> Unmerged | None:
    """Steps 1 and 2. None if the layer cannot be compared."""
    try:
        layer.eval()  # PEFT leaves a combined adapter in training mode, in which dropout is random
        inputs = [tuple(one.to(device) for one in _inputs(layer, seed)) for seed in (0, 1)]
        if not all(inputs):
            return None
        plain = [_run(layer.get_base_layer(), given) for given in inputs]
        *adapted, again = [_run(layer, given) for given in (*inputs, inputs[0])]
    except Exception as error:  # the layer needs other inputs
        raise_if_of_the_run(error)
        return None
    is_same = torch.allclose(adapted[0], again, equal_nan=True)  # PVeRA can draw random numbers on each call
    return Unmerged(inputs=inputs, plain=plain, adapted=adapted) if is_same else None


def _run(module: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
    returned = module(*given)
    values: Tensor = returned[0] if isinstance(returned, tuple) else returned
    return values.clone()  # of 4 bits, it may be a view of what the layer still uses


def _shares(plain: Tensor, adapted: Tensor, merged: Tensor) -> tuple[float, float]:
    """‖merged − adapted‖ as a share of the adapter's change, and of the output.

    Values that are not finite without the merge do not count. NaN if none counts, if nothing changes, or if others are
    not finite.
    """
    counts = plain.isfinite() & adapted.isfinite()
    plain, adapted, merged = plain[counts], adapted[counts], merged[counts]
    error, change = _distance(merged, adapted), max(_distance(adapted, plain), _distance(merged, plain))
    if change == 0:
        return math.nan, math.nan
    return error / change, error / max(_distance(adapted, torch.zeros_like(adapted)), TINY)


def _distance(left: Tensor, right: Tensor) -> float:
    return float(torch.linalg.vector_norm(left - right, dtype=torch.float64))


def _inputs(layer: Any, seed: int) -> tuple[Tensor, ...]:
    """Step 1: the positional arguments of the layer's forward; () if they are unknown."""
    base_layer, generator = layer.get_base_layer(), torch.Generator().manual_seed(seed)
    if isinstance(base_layer, nn.Embedding):
        # Rows of the first half only: some classes shift the index, or compute it.
        rows = torch.randperm(max(1, base_layer.num_embeddings // 2), generator=generator)[:MOST_ROWS]
        tokens = (getattr(layer, "token_indices", None) or {}).get(ADAPTER_NAME, ())
        return (torch.cat((rows, torch.tensor(tokens[:MOST_ROWS], dtype=rows.dtype)))[None],)
    if isinstance(base_layer, nn.Linear | Conv1D):
        features = base_layer.nx if isinstance(base_layer, Conv1D) else base_layer.in_features
        return (torch.randn(1, 4, features, generator=generator),)
    if isinstance(base_layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return _picture(base_layer, generator)
    if isinstance(base_layer, nn.MultiheadAttention):
        return (torch.randn(4, 1, base_layer.embed_dim, generator=generator),) * 3
    size = getattr(base_layer, "hidden_dim", None) or getattr(base_layer, "hidden_size", None)
    count = getattr(base_layer, "num_experts", None)
    if size and count and [*inspect.signature(base_layer.forward).parameters][:1] == ["hidden_states"]:  # experts
        states = torch.randn(count, size, generator=generator)
        return states, torch.arange(count)[:, None], torch.ones(count, 1)  # a token for each of them
    return ()


def _picture(layer: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Random values inside a border of zeros. PEFT pads its own part with zeros, whatever the layer pads with.

    One window of the kernel at least is inside, wherever the strides begin.
    """
    reach = [1 + step * (size - 1) for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
    inside = [size + stride for size, stride in zip(reach, layer.stride, strict=True)]
    sizes = (2 * border + size for border, size in zip(reach, inside, strict=True))
    if math.prod(sizes) * max(layer.weight.shape[:2]) > MOST_VALUES:
        return ()
    borders = [size for size in reversed(reach) for _ in range(2)]
    return (nn.functional.pad(torch.randn(1, layer.in_channels, *inside, generator=generator), borders),)
