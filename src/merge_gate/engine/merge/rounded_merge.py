"""Whether the roundings of PEFT's merge explain a merged tensor, given the proven merge in float32.

In: a tensor in its final dtype, its layer's merge in float32, and the base's values. Out: what they do not explain.

1. PEFT rounds a sum at most twice: the change, and the sum. So a value is explained if it lies between the rounded ends
   of merged ± half a unit of the change.
2. The methods in `INTERMEDIATE` make intermediate values in 16 bits. If step 1 leaves values over, each has to be
   within `MOST_UNITS` of the largest value. The errors' norm is at most that of roundings. Roundings hardly depend on
   each other, so neither their sum nor their part along the change is above four standard deviations, and a share of
   what it would be if all of them went the same way.
3. A rounded factor changes a whole row alike (a cosine of RoAd, a vector of GLoRA). So step 2 compares with another
   merge by PEFT in float32, whose factors are rounded as PEFT rounds them.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from peft.tuners.frod.layer import FrodLayer
from peft.tuners.glora.layer import GloraLayer, GloraPath
from peft.tuners.hira.layer import HiraLayer
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.road import layer as road

INTERMEDIATE: Mapping[type, float] = MappingProxyType(
    {FrodLayer: 0.02, GloraLayer: 0.05, HiraLayer: 0.01, MultiheadAttention: 0.01, road.RoadLayer: 0.0}
)
"""The layers that step 2 is for, and the share of roundings that may go the same way.

A product with a constant in bfloat16 has 128 results for each exponent, and their roundings do not cancel: 0.006 in
GLoRA. The factors of FRoD are the same for all of its values: 0.004 in FRoD. The others have less than 0.001.
"""

ROUNDED_FACTORS = (GloraLayer, road.RoadLayer)
"""The layers that step 3 is for."""

MOST_UNITS = 8.0
"""Half units of the largest value. PEFT's own methods differ by 3.6 at most, if their factors are well-conditioned."""

MOST_DEVIATIONS = 4.0
"""Healthy merges have at most 2.0 in 2,048 values, with changes of 0.02 % to 4,300 % of the weight."""

ELEMENTS = 1 << 16
"""Values that are compared at a time: they stay in the processor's cache."""

FLOAT32 = 2.0**-20
"""The error of the merge in float32, as a share of a value and of its change."""


def unexplained(
    final: torch.Tensor,
    exact: torch.Tensor,
    base: torch.Tensor,
    expected: torch.Tensor | None = None,
    *,
    shared: float = 0.0,
) -> tuple[int, float | None] | None:
    """Compare a merged tensor, of at most 32 bits, with its merge in float32.

    Returns how many values are not explained, and the factor of the merge's change that the tensor has. None for a
    tensor that is not finite, too: it fails by its measurement. `expected` is what steps 2 and 3 compare with. Without
    it, step 1 alone counts: PEFT has rounded nothing in 16 bits except the change and the sum. `shared` is the share of
    `INTERMEDIATE`.
    """
    places = _odd(final.flatten(), exact.flatten(), base.flatten())
    got, merged, was = (tensor.flatten().index_select(0, places).float() for tensor in (final, exact, base))
    info, change = torch.finfo(final.dtype), merged - was
    room = change.abs() * (info.eps / 2 + FLOAT32) + merged.abs() * FLOAT32 + info.tiny * info.eps
    low, high = ((merged + offset).to(final.dtype).float() for offset in (-room, room))  # 1.
    outside = (got < low) | (got > high)
    if not outside.any() or not final.isfinite().all():
        return None
    values = int((outside & merged.isfinite()).sum())
    if not values or (expected is not None and _are_roundings(final, expected, base, shared)):
        return None
    delta = (exact - base).double()
    whole, moved = float(delta.square().sum()), float(((final.double() - base) * delta).sum())
    return values, moved / whole if whole and math.isfinite(moved) else None


def _are_roundings(final: torch.Tensor, expected: torch.Tensor, base: torch.Tensor, shared: float) -> bool:
    """Step 2."""
    info, counts = torch.finfo(final.dtype), expected.isfinite()
    errors = (final.double() - expected.clamp(info.min, info.max).to(final.dtype))[counts]
    sizes = torch.maximum(expected.abs(), base.abs())[counts].double()
    along = (expected - base)[counts].double()
    if float(errors.abs().max()) > MOST_UNITS * info.eps / 2 * float(sizes.max()):
        return False
    for part in (torch.ones_like(along), along):
        most = part.abs() * sizes
        if abs(float((errors * part).sum())) > info.eps * float(MOST_DEVIATIONS * most.norm() + shared * most.sum()):
            return False
    return float(errors.norm()) <= info.eps * float(sizes.norm())


_PATCHED = threading.Lock()


@contextlib.contextmanager
def rounded_factors(layer: Any, dtype: torch.dtype) -> Iterator[None]:
    """Step 3. Inside of the block, the layer's merge in float32 gets factors that are rounded to `dtype`."""

    def rounded(factor: Any) -> Any:
        return factor.to(dtype).float() if isinstance(factor, torch.Tensor) else factor

    paths = [module for module in layer.modules() if isinstance(module, GloraPath)]
    hooks = [path.register_forward_hook(lambda _path, _given, factor: rounded(factor)) for path in paths]
    with _PATCHED:  # the class of RoAd has no method for its factor
        own = road._get_delta_weight
        road._get_delta_weight = lambda *given: rounded(own(*given))
        try:
            yield
        finally:
            road._get_delta_weight = own
            for hook in hooks:
                hook.remove()


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
