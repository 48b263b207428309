"""What can be said of a merge without making it: a bound on its values.

In: an update, and how large the weight is. Out: a number. Knows torch and nothing else.
"""

from __future__ import annotations

import math

import torch

from merge_gate.engine.blocks.delta import LowRankUpdate

MOST_RANK = 1 << 16
"""Up to this rank the roundings of a float32 sum are negligible in a `merged_bound`."""

ROUNDINGS = 2.0
"""What all roundings of a merge may add to a value, as a factor; they add 2 % at most."""

_ACCUMULATED = (torch.float32, torch.float64)
"""Dtypes of factors whose product is summed in the same dtype on every device."""


@torch.no_grad()
def merged_bound(weight_max: float, update: LowRankUpdate, dtype: torch.dtype) -> float:
    """A number that no |W + scaling · B @ A| exceeds, whoever computes it; infinite where some step could overflow.

    An element of B @ A is a sum of r products, so that it and each of its partial sums, in any order, is at most
    r · max|B| · max|A|. A rounding adds a share of 2⁻⁸ (bfloat16) or less: r + 3 of them, all but three in the factors'
    dtype, stay far below the factor `ROUNDINGS`; among denormals it adds less than the least normal number. Whatever is
    held on the way has to fit its dtype, the scaling too. "Whoever" holds the factors in float32 or float64, as PEFT
    does by default, on any device and with any kernel. There is no bound of a DoRA merge: it divides by a norm.

    Args:
        weight_max: max|W|, of a W that is finite.
        update: what is merged into it.
        dtype: of W, to which the delta is rounded and in which it is added.
    """
    rank, own = update.lora_a.shape[0], update.lora_a.dtype
    if own not in _ACCUMULATED or rank > MOST_RANK or update.magnitude is not None:
        return math.inf
    extremes = torch.stack((*torch.aminmax(update.lora_a), *torch.aminmax(update.lora_b)))
    low_a, high_a, low_b, high_b = extremes.tolist()
    product = rank * max(-low_a, high_a) * max(-low_b, high_b)
    delta = product * abs(update.scaling)
    merged = weight_max + delta
    held = ((abs(update.scaling), own), (product, own), (delta, own), (delta, dtype), (merged, dtype))
    fits = all(ROUNDINGS * size < torch.finfo(where).max for size, where in held)  # false of NaN
    return ROUNDINGS * merged + torch.finfo(dtype).tiny if fits else math.inf
