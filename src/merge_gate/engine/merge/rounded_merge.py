"""Whether the roundings of PEFT's merge explain a merged tensor, given the proven merge in float32.

In: a tensor in its final dtype, its layer's merge in float32, and the base's values. Out: what they do not explain.

1. PEFT rounds a sum at most twice: the change, and the sum. So a value is explained if it lies between the rounded ends
   of merged ± half a unit of the change.
2. Some methods (RoAd, GLoRA, HiRA, FRoD, attention of torch) make intermediate values in 16 bits. If step 1 leaves
   values over, each value has to be within `MOST_UNITS` of the largest value. That alone would let a change pass that
   is smaller, so the tensor also has to have the merge's change as a whole. A rounded factor (a cosine of RoAd) changes
   many values alike, so the errors may add up, but to no more than two roundings of each value.
"""

from __future__ import annotations

import math

import torch

MOST_UNITS = 8.0
"""Half units of the largest value. PEFT's own methods differ by 3.6 at most, if their factors are well-conditioned."""

MOST_SHARE = 0.02
"""The share of the change that may be missing or added, in addition."""

ELEMENTS = 1 << 16
"""Values that are compared at a time: they stay in the processor's cache."""

FLOAT32 = 2.0**-20
"""The error of the merge in float32, as a share of a value and of its change."""


def unexplained(
    final: torch.Tensor, exact: torch.Tensor, base: torch.Tensor, *, is_sum: bool
) -> tuple[int, float | None] | None:
    """Compare a merged tensor, of at most 32 bits, with its merge in float32.

    Returns how many values are not explained, and the factor of the merge's change that the tensor has. None for a
    tensor that is not finite, too: it fails by its measurement. `is_sum`: PEFT has rounded nothing in 16 bits except
    the change and the sum, so step 2 does not apply.
    """
    places = _odd(final.flatten(), exact.flatten(), base.flatten())
    got, merged, was = (tensor.flatten().index_select(0, places).float() for tensor in (final, exact, base))
    info, change = torch.finfo(final.dtype), merged - was
    room = change.abs() * (info.eps / 2 + FLOAT32) + merged.abs() * FLOAT32 + info.tiny * info.eps
    low, high = ((merged + offset).to(final.dtype).float() for offset in (-room, room))  # 1.
    outside = (got < low) | (got > high)
    if not outside.any() or not final.isfinite().all():
        return None
    counts = merged.isfinite()
    values = int((outside & counts).sum())
    sizes = torch.maximum(exact.abs(), base.abs().float())  # 2.
    most = float(sizes.max()) * MOST_UNITS * info.eps / 2
    is_near = not bool((counts & ((got - merged).abs() > most)).any())
    once = merged.clamp(info.min, info.max).to(final.dtype)
    errors = ((got - once).double() * change)[counts]
    delta = (exact - base).double()
    whole = float(delta.square().sum())
    allowed = info.eps * float((delta.abs() * sizes).sum()) + MOST_SHARE * whole
    if not values or (not is_sum and is_near and abs(float(errors.sum())) <= allowed):
        return None
    moved = float(((final.double() - base) * delta).sum())
    return values, moved / whole if whole and math.isfinite(moved) else None


def _odd(final: torch.Tensor, exact: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """The places of values, except for the merge rounded once, and for the sum of the base and its rounded change."""
    bits = torch.int16 if final.itemsize == 2 else torch.int32  # noqa: PLR2004 - bytes
    places = []
    for start in range(0, len(final), ELEMENTS):
        some = slice(start, start + ELEMENTS)
        got, once = final[some].view(bits), exact[some].to(final.dtype).view(bits)
        if not torch.equal(got, once):
            twice = (base[some] + (exact[some] - base[some]).to(final.dtype)).to(final.dtype).view(bits)
            if not torch.equal(got, twice):
                places.append(((got != twice) & (got != once)).nonzero()[:, 0] + start)
    return torch.cat(places) if places else torch.empty(0, dtype=torch.int64, device=final.device)
