"""Which blocks of a merge can hold its least and its greatest value: every element merged, errors bounded.

In: a dense 16-bit weight and an update, in blocks of rows. Out: the blocks that have to be merged with PEFT's roundings
to know the extremes of the whole merge. Knows torch: no PEFT, no models, no files; judges nothing.

PEFT rounds three times: the product to float32, the delta to the weight's dtype, the sum to it. Each rounding keeps the
order of values, and none of them is larger than a bound. So:

1. Every element is merged, W + scaling · B @ A in one product, and measured. Let t be such a sum: in float32, or of a
   weight stored in bfloat16 in bfloat16, where the processor multiplies that, in half the time. A weight that is wanted
   in another dtype than it is stored in is read as it is stored.
2. What PEFT rounds last, to the final dtype, is within `reach` of t.
3. A block whose greatest t, plus reach, is rounded to no more than a value that another block is known to hold, holds
   nothing greater. Likewise for the least. All others are merged with PEFT's roundings, the likeliest first.

Usually two to four blocks are left. NaN and infinities are in every sum that they are part of. Where one is found, and
where a value comes near the limits of a dtype, all blocks are merged as PEFT merges them.

The bound of step 2, with u the largest relative error of a rounding in a dtype, r the rank, and P not less than
|scaling| · Σ|b||a| of any element (by Cauchy and Schwarz from the norms of rows and columns):

    rounding the delta                       u(W) · P, and u(factors) · P where PEFT rounds it to their dtype as well
    rounding the stored weight to W          u(W) · |W|
    all in float32: r products, their sum in any order, the scaling, W, in either merge
                                             (4 r + 32) · 2⁻²⁴ · (|W| + P) each
    what is below the least normal number    its place is lost, whatever the order of factors
    in bfloat16 besides: both factors        2 u · P
        the product, if it is rounded        u · P
        the sum                              u · |t|
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from merge_gate.engine.blocks.delta import HALVES, Factors, LowRankUpdate
from merge_gate.engine.tensors.buffers import Buffers

SLACK = 1.01
"""What the norms of P and the terms of the bound may be off by, many times over."""

UNIT = 2.0**-24
"""u of float32."""

LEAST = 2.0**-120
"""More than a product or a sum in float32 can lose below its least normal number, 2⁻¹²⁶, flushed to zero or not."""

MOST = 2.0**120
"""Factors and products up to here are far from float32's limit in any order of multiplication."""

VANISHED = 2.0**-60
"""More than the root of a square that float32 flushes to zero."""

MOST_RANK = 1 << 15

LEAST_BLOCKS = 8
"""Of fewer blocks too large a share is left, and the bound costs as much as one of them."""

ROOM = 0.25
"""Values may come to this share of the largest of their dtype."""

WORTH = 1 / 8
"""A reach above this share of the values' range leaves most blocks as candidates."""

TOGETHER = 4
"""So many blocks are multiplied in one bfloat16 product: half as large as in float32, and dearer to begin."""

Ends = tuple[float, float]
"""The least and the greatest of some values."""


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16, and torch uses them."""
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return asked is not None and bool(asked()) and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Bound:
    """`product` is P of the module's docstring, `fixed` the part of the reach that does not depend on the values.

    `share` is the relative error of a merge in float32, `cast` that of the stored weight. `rounding` is u of the dtype
    that the sums are rounded to; of float32 it is in `share`.
    """

    product: float
    share: float
    cast: float
    fixed: float
    ceiling: float
    rounding: float

    @classmethod
    @torch.no_grad()
    def of(
        cls, factors: Factors, scaling: float, dtype: torch.dtype, *, stored: torch.dtype, in_bfloat16: bool = False
    ) -> Bound | None:
        """None where float32 may leave its range on the way, so that nothing is proved."""
        left, right, rank = factors.left, factors.right, factors.left.shape[1]
        if rank > MOST_RANK:
            return None
        a, b = float(lengths(right, 0).max()), float(lengths(left, 1).max())
        sizes = (a, b, abs(scaling), a * b, a * abs(scaling), b * abs(scaling), a * b * abs(scaling))
        if not all(size <= MOST for size in sizes) or abs(scaling) < 1 / MOST:  # NaN is not
            return None
        product = abs(scaling) * a * b * SLACK
        rounded = [dtype] if factors.rounded_to is None else [dtype, factors.rounded_to]
        share = (4 * rank + 32) * UNIT
        casts = [] if stored == dtype else [dtype]
        lost = rank * LEAST * (1 + a + b + abs(scaling)) + sum(torch.finfo(one).tiny for one in (*casts, *rounded))
        narrow = unit(torch.bfloat16) if in_bfloat16 else 0.0
        fixed = SLACK * (sum(map(unit, rounded)) + 3 * narrow) * product + lost
        ceiling = ROOM * min(torch.finfo(one).max for one in (*rounded, torch.float32))
        return cls(product, share, sum(map(unit, casts)), fixed, ceiling, narrow)

    def reach(self, ends: Ends) -> float | None:
        """How far what PEFT rounds last is from the sums with these extremes; None if they are near a limit, or NaN."""
        largest = max(-ends[0], ends[1])
        if not (math.isfinite(ends[0]) and math.isfinite(ends[1]) and largest + self.product <= self.ceiling):
            return None
        weight = 2 * (largest + self.product)  # not less than any |W|
        in_float32 = 2 * self.share * (weight + self.product)
        return SLACK * (self.fixed + in_float32 + self.cast * weight + self.rounding * largest)


def unit(dtype: torch.dtype) -> float:
    """u: the largest relative error of a rounding to it."""
    return torch.finfo(dtype).eps / 2


def lengths(vectors: torch.Tensor, dim: int) -> torch.Tensor:
    """Not less than the norm of each of them, in float64: squares that vanish in float32 are made good for."""
    return vectors.square().sum(dim).double().sqrt() * SLACK + math.sqrt(vectors.shape[dim]) * VANISHED


def _ends(sums: torch.Tensor) -> Ends:
    least, greatest = torch.aminmax(sums)
    return float(least), float(greatest)


def summed(
    stored: torch.Tensor,
    factors: Factors,
    scaling: float,
    slices: Sequence[slice],
    buffers: Buffers,
    *,
    in_bfloat16: bool,
) -> Iterator[tuple[Sequence[slice], torch.Tensor]]:
    """Step 1: some blocks and their sums, which the next ones overwrite."""
    left, right, alpha, together, dtype = factors.left, factors.right, scaling, 1, torch.float32
    if in_bfloat16:
        left, right, alpha, together = (left * scaling).bfloat16(), right.bfloat16(), 1.0, TOGETHER
        dtype = torch.bfloat16
    for first in range(0, len(slices), together):
        blocks = slices[first : first + together]
        rows = slice(blocks[0].start, blocks[-1].stop)
        base = stored[rows]
        sums = buffers.take("sum", base, dtype)
        torch.addmm(base if base.dtype == dtype else sums.copy_(base), left[rows], right, alpha=alpha, out=sums)
        yield blocks, sums


class Screen:
    """The merge of a weight in one product: `stored` as it lies in memory, `dtype` as it is wanted."""

    def __init__(
        self,
        stored: torch.Tensor,
        update: LowRankUpdate,
        dtype: torch.dtype,
        slices: Sequence[slice],
        buffers: Buffers,
    ) -> None:
        self._slices, self._dtype = slices, dtype
        factors = Factors.of(update.lora_a, update.lora_b, transposed=update.transposed)
        in_bfloat16 = stored.dtype == torch.bfloat16 and multiplies_bfloat16()
        self._bound = Bound.of(factors, update.scaling, dtype, stored=stored.dtype, in_bfloat16=in_bfloat16)
        self._summed = summed(stored, factors, update.scaling, slices, buffers, in_bfloat16=in_bfloat16)

    @staticmethod
    def suits(stored: torch.Tensor, update: LowRankUpdate, dtype: torch.dtype, slices: Sequence[slice]) -> bool:
        """Whether there are blocks to leave out, of a LoRA that rounds its sums."""
        narrow = dtype in HALVES and torch.float64 not in (stored.dtype, update.lora_a.dtype)
        return narrow and update.magnitude is None and len(slices) >= LEAST_BLOCKS

    def candidates(self) -> Candidates | None:
        """None where nothing can be left out: every block has to be merged as PEFT merges it."""
        bound = self._bound
        if bound is None:
            return None
        found: list[Ends] = []
        for blocks, sums in self._summed:
            for rows in blocks:
                start = blocks[0].start
                least, greatest = _ends(sums[rows.start - start : rows.stop - start])
                reach = bound.reach((least, greatest))
                if reach is None or (not found and reach > WORTH * (greatest - least)):
                    return None
                found.append((least, greatest))
        reach = bound.reach((min(low for low, _ in found), max(high for _, high in found)))
        return None if reach is None else Candidates(found, [reach] * len(found), rounding_to(self._dtype))


@dataclass(frozen=True, slots=True)
class Candidates:
    """Step 3. A block holds nothing beyond its `ends` by more than its reach; `rounded` as all is in the end."""

    ends: Sequence[Ends]
    reaches: Sequence[float]
    rounded: Callable[[float], float]

    def visit(self, merged: Callable[[int], Ends]) -> None:
        """Have every block merged, by its number, that can hold an extreme; `merged` says what it holds.

        All of them, as soon as one holds what the bound excludes: some library does not compute in float32 then.
        """
        known: dict[int, Ends] = {}
        for sign, end in ((1.0, 1), (-1.0, 0)):  # the greatest; the least is the greatest of -x
            sums = [sign * ends[end] for ends in self.ends]
            most = [one + reach for one, reach in zip(sums, self.reaches, strict=True)]
            best = -math.inf
            for number in sorted(range(len(most)), key=most.__getitem__, reverse=True):
                if self.rounded(most[number]) <= best:
                    break
                if number not in known:
                    known[number] = merged(number)
                found = sign * known[number][end]
                if not self.rounded(sums[number] - self.reaches[number]) <= found <= self.rounded(most[number]):
                    for other in set(range(len(sums))) - known.keys():
                        merged(other)
                    return
                best = max(best, found)


def rounding_to(dtype: torch.dtype) -> Callable[[float], float]:
    """How PEFT rounds a sum: to float32 first."""
    return lambda value: float(torch.tensor(value, dtype=torch.float32).to(dtype))
