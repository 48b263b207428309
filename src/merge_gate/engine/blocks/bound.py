"""A bound on the values of a merge, without the merge.

In: an update, and the largest value of the weight. Out: a number. Knows torch and nothing else.
"""

from __future__ import annotations

import math

import torch

from merge_gate.engine.blocks.delta import LowRankUpdate

MOST_RANK = 1 << 16
"""Up to this rank the roundings of a float32 sum are negligible in `merged_bound`."""

ROUNDINGS = 2.0
"""Factor by which all roundings of a merge may enlarge a value. In truth they add 2 % at most."""

_ACCUMULATED = (torch.float32, torch.float64)
"""Dtypes of factors whose product is summed in the same dtype on every device."""


@torch.no_grad()
def merged_bound(weight_max: float, update: LowRankUpdate, dtype: torch.dtype) -> float:
    """A number that no |W + scaling · B @ A| exceeds, on any device, with any kernel; infinite if a step can overflow.

    1. An element of B @ A is a sum of r products. It and each of its partial sums, in any order, is at most
       r · max|B| · max|A|.
    2. A rounding adds a share of 2⁻⁸ (bfloat16) or less. There are r + 3, all but three in the factors' dtype, and
       together they stay far below the factor `ROUNDINGS`. Among denormals, a rounding adds less than the least normal
       number.
    3. Every intermediate value has to fit its dtype, the scaling included.

    The factors must be in float32 or float64, as PEFT holds them by default. DoRA has no such bound, because it divides
    by a norm.

    Args:
        weight_max: max|W| of a finite W.
        update: the update that is merged into W.
        dtype: the dtype of W. The delta is rounded to it and added in it.
    """
    rank, own = update.lora_a.shape[0], update.lora_a.dtype
    if own not in _ACCUMULATED or rank > MOST_RANK or update.magnitude is not None:
        return math.inf
    extremes = torch.stack((*torch.aminmax(update.lora_a), *torch.aminmax(update.lora_b)))
    low_a, high_a, low_b, high_b = extremes.tolist()
    product = rank * max(-low_a, high_a) * max(-low_b, high_b)  # 1.
    delta = product * abs(update.scaling)
    merged = weight_max + delta
    steps = ((abs(update.scaling), own), (product, own), (delta, own), (delta, dtype), (merged, dtype))
    fits = all(ROUNDINGS * size < torch.finfo(held_in).max for size, held_in in steps)  # 3. False for NaN.
    return ROUNDINGS * merged + torch.finfo(dtype).tiny if fits else math.inf
