"""The blocks of a merge that can hold its least and greatest values: every element is merged, and errors are bounded.

In: a dense 16-bit weight and an update, in blocks of rows. Out: the blocks that have to be merged with PEFT's roundings
to know the extremes of the whole merge. Knows torch: no PEFT, no models, no files; judges nothing.

PEFT rounds three times: the product to float32, the delta to the weight's dtype, the sum to the weight's dtype. Each
rounding keeps the order of values, and each error has a bound. So:

1. Every element is merged in one product, W + scaling · B @ A, and measured. Let t be such a sum, in float32. For a
   weight in bfloat16 the product is in bfloat16, if the processor multiplies bfloat16: that takes half the time.
2. The value that PEFT rounds last, to the final dtype, is within `reach` of t.
3. Take the greatest t of a block, plus reach, rounded. If another block holds a value that is at least as great, this
   block cannot hold the greatest value. The same holds for the least. All other blocks are merged with PEFT's
   roundings, the likeliest first.

Usually two to four blocks remain. NaN and infinities appear in every sum that they are part of. If there is one, or if
a value comes near the limit of a dtype, all blocks are merged as PEFT merges them.

For a DoRA, PEFT computes S = W + delta in float32 and N = ‖S‖ of each row. It rounds magnitude / N · S once, to the
weight's dtype. For each row, in float64:

4. Take its largest |t|, and ‖t‖. NaN and infinities appear in both.
5. |S - t| <= D for its elements. D is the bound of step 2, except that PEFT does not round the delta of a DoRA.
6. ‖S - t‖ <= E for the row. E is the same bound with norms in place of values.
7. A norm of n values, summed in float32 in any order, has a relative error of at most n · 2⁻²⁴. Rounding it to bfloat16
   adds u. So N is at least ‖t‖ - E, less these shares.
8. No absolute value of the row exceeds |magnitude| / N · (|t| + D) before it is rounded. This one number bounds both
   ends of a block.

There is no proof if a value comes near the limit of a dtype, or if a norm may vanish.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from merge_gate.engine.blocks.delta import HALVES, Factors, LowRankUpdate
from merge_gate.engine.tensors.threads import Buffers

# The bound of step 2 is the sum of these errors. u is the largest relative error of a rounding in a dtype, and r the
# rank. P is at least |scaling| · Σ|b||a| of any element, by Cauchy and Schwarz from the norms of rows and columns.
#
#   the delta is rounded to W's dtype        u(W) · P
#   PEFT rounds it to the factors' dtype     u(factors) · P, if that is a 16-bit dtype
#   float32, in each of the two merges       (4 r + 32) · 2⁻²⁴ · (|W| + P): r products, their sum in any order, the
#                                            scaling, W
#   below the least normal number            everything there is lost, in any order of the factors
#   bfloat16, if step 1 uses it              2 u · P for the factors, u · P for the product, u · |t| for the sum

ROUNDING_MARGIN = 1.01
"""Factor for the rounding errors in P and in the bound itself. It is many times larger than they are."""

UNIT = 2.0**-24
"""u of float32."""

LEAST = 2.0**-120
"""More than a product or a sum in float32 can lose below the least normal number, 2⁻¹²⁶, flushed to zero or not."""

MOST = 2.0**120
"""Factors and products up to this size stay far from float32's limit in any order of multiplication."""

LARGEST_FLUSHED = 2.0**-60
"""More than the root of any square that float32 flushes to zero."""

MOST_RANK = 1 << 15

LEAST_BLOCKS = 8
"""With fewer blocks, too large a share of them remains, and the bound costs as much as one block."""

LARGEST_SHARE = 0.25
"""Values may reach this share of the largest value of their dtype."""

WIDEST_REACH = 1 / 8
"""If the reach is more than this share of the values' range, most blocks remain candidates."""

BLOCKS_PER_PRODUCT = 4
"""Number of blocks in one bfloat16 product: they are half as large as in float32, and a call costs more."""

Ends = tuple[float, float]
"""The least and the greatest value."""


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16 products, and torch uses them."""
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return asked is not None and bool(asked()) and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Bound:
    """The bound of step 2. `product` is P, and `fixed` is the part of the reach that does not depend on the values.

    `share` is the relative error of a merge in float32. `rounding` is u of the sums' dtype; for float32 it is part of
    `share`.
    """

    product: float
    share: float
    fixed: float
    ceiling: float
    rounding: float

    @classmethod
    @torch.no_grad()
    def of(cls, factors: Factors, scaling: float, dtype: torch.dtype, *, in_bfloat16: bool = False) -> Bound | None:
        """None if an intermediate value may leave the range of float32: then there is no proof."""
        left, right, rank = factors.left, factors.right, factors.left.shape[1]
        if rank > MOST_RANK:
            return None
        a, b = float(lengths(right, 0).max()), float(lengths(left, 1).max())
        sizes = (a, b, abs(scaling), a * b, a * abs(scaling), b * abs(scaling), a * b * abs(scaling))
        if not all(size <= MOST for size in sizes) or abs(scaling) < 1 / MOST:  # also true for NaN
            return None
        product = abs(scaling) * a * b * ROUNDING_MARGIN
        rounded = [dtype] if factors.rounded_to is None else [dtype, factors.rounded_to]
        share = (4 * rank + 32) * UNIT
        lost = rank * LEAST * (1 + a + b + abs(scaling)) + sum(torch.finfo(each).tiny for each in rounded)
        narrow = unit(torch.bfloat16) if in_bfloat16 else 0.0
        fixed = ROUNDING_MARGIN * (sum(map(unit, rounded)) + 3 * narrow) * product + lost
        ceiling = LARGEST_SHARE * min(torch.finfo(each).max for each in (*rounded, torch.float32))
        return cls(product, share, fixed, ceiling, narrow)

    def reach(self, ends: Ends) -> float | None:
        """The reach of sums with these extremes; None if they are near a limit, or NaN."""
        largest = max(-ends[0], ends[1])
        if not (math.isfinite(ends[0]) and math.isfinite(ends[1]) and largest + self.product <= self.ceiling):
            return None
        weight = 2 * (largest + self.product)  # not less than any |W|
        in_float32 = 2 * self.share * (weight + self.product)
        return ROUNDING_MARGIN * (self.fixed + in_float32 + self.rounding * largest)


def unit(dtype: torch.dtype) -> float:
    """u: the largest relative error of a rounding to this dtype."""
    return torch.finfo(dtype).eps / 2


def lengths(vectors: torch.Tensor, dim: int) -> torch.Tensor:
    """At least the norm of each vector, in float64. It allows for squares that vanish in float32."""
    return vectors.square().sum(dim).double().sqrt() * ROUNDING_MARGIN + math.sqrt(vectors.shape[dim]) * LARGEST_FLUSHED


def _ends(sums: torch.Tensor) -> Ends:
    least, greatest = torch.aminmax(sums)
    return float(least), float(greatest)


def summed(
    weight: torch.Tensor,
    factors: Factors,
    scaling: float,
    slices: Sequence[slice],
    buffers: Buffers,
    *,
    in_bfloat16: bool,
) -> Iterator[tuple[Sequence[slice], torch.Tensor]]:
    """Step 1: a few blocks at a time and their sums. The next sums overwrite them."""
    left, right, alpha, together, dtype = factors.left, factors.right, scaling, 1, torch.float32
    if in_bfloat16:
        left, right, alpha, together = (left * scaling).bfloat16(), right.bfloat16(), 1.0, BLOCKS_PER_PRODUCT
        dtype = torch.bfloat16
    for first in range(0, len(slices), together):
        blocks = slices[first : first + together]
        rows = slice(blocks[0].start, blocks[-1].stop)
        base = weight[rows]
        sums = buffers.take("sum", base, dtype)
        torch.addmm(base if base.dtype == dtype else sums.copy_(base), left[rows], right, alpha=alpha, out=sums)
        yield blocks, sums


class Screen:
    """The merge of a weight in one product."""

    def __init__(self, weight: torch.Tensor, update: LowRankUpdate, slices: Sequence[slice], buffers: Buffers) -> None:
        self._slices, self._dtype = slices, weight.dtype
        factors = Factors.of(update.lora_a, update.lora_b, transposed=update.transposed)
        in_bfloat16 = weight.dtype == torch.bfloat16 and multiplies_bfloat16()
        self._bound = Bound.of(factors, update.scaling, weight.dtype, in_bfloat16=in_bfloat16)
        self._summed = summed(weight, factors, update.scaling, slices, buffers, in_bfloat16=in_bfloat16)

    @staticmethod
    def suits(weight: torch.Tensor, update: LowRankUpdate, slices: Sequence[slice]) -> bool:
        """Whether this can save work: a LoRA whose sums are rounded, on a weight of enough blocks."""
        narrow = weight.dtype in HALVES and update.lora_a.dtype != torch.float64
        return narrow and update.magnitude is None and len(slices) >= LEAST_BLOCKS

    def candidates(self) -> Candidates | None:
        """None if every block has to be merged as PEFT merges it."""
        bound = self._bound
        if bound is None:
            return None
        ends: list[Ends] = []
        for blocks, sums in self._summed:
            for rows in blocks:
                start = blocks[0].start
                least, greatest = _ends(sums[rows.start - start : rows.stop - start])
                reach = bound.reach((least, greatest))
                if reach is None or (not ends and reach > WIDEST_REACH * (greatest - least)):
                    return None
                ends.append((least, greatest))
        reach = bound.reach((min(low for low, _ in ends), max(high for _, high in ends)))
        return None if reach is None else Candidates(ends, [reach] * len(ends), rounding_to(self._dtype))


@dataclass(frozen=True, slots=True)
class Candidates:
    """Step 3. No value of a block exceeds its `ends` by more than its reach. `rounded` is PEFT's last rounding."""

    ends: Sequence[Ends]
    reaches: Sequence[float]
    rounded: Callable[[float], float]

    def visit(self, merged: Callable[[int], Ends]) -> None:
        """Call `merged` with the number of every block that can hold an extreme. It returns the block's ends.

        If a block holds a value that the bound excludes, all blocks are merged: some library then does not compute in
        float32.
        """
        known: dict[int, Ends] = {}
        for sign, end in ((1.0, 1), (-1.0, 0)):  # the greatest; the least is the greatest of -x
            sums = [sign * ends[end] for ends in self.ends]
            most = [value + reach for value, reach in zip(sums, self.reaches, strict=True)]
            best = -math.inf
            for number in sorted(range(len(most)), key=most.__getitem__, reverse=True):
                if self.rounded(most[number]) <= best:
                    break
                if number not in known:
                    known[number] = merged(number)
                value = sign * known[number][end]
                if not self.rounded(sums[number] - self.reaches[number]) <= value <= self.rounded(most[number]):
                    for other in set(range(len(sums))) - known.keys():
                        merged(other)
                    return
                best = max(best, value)


def rounding_to(dtype: torch.dtype) -> Callable[[float], float]:
    """PEFT's last rounding of a sum, which is in float32 before."""
    return lambda value: float(torch.tensor(value, dtype=torch.float32).to(dtype))


# D of step 5, with u, r, and W as above, and P = |scaling| · ‖b‖ · longest column of A:
#
#   float32, in both merges           2 · (4 r + 32) · 2⁻²⁴ · (|W| + P)
#   bfloat16, if step 1 uses it       3 u · P for factors and product, u · |t| for the sum
#   below the least normal number     everything there is lost
#
# E of step 6: the error of an element is at most a share of Σ|b||a|, and the norm of these sums over a row is at most
# |scaling| · ‖b‖ · ‖A‖, with A's Frobenius norm. So E is D with this product in place of P, and norms of rows for |W|.

MOST_COLUMNS = 1 << 16
"""Up to this number of columns, the shares of step 7 are below a hundredth."""

_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
"""Absolute values have the order of their bits, with NaN above infinity. Comparing integers takes half the time."""


@functools.cache
def norms_are_summed_in_float32() -> bool:
    """Whether torch sums squares of bfloat16 in float32. A sum in bfloat16 would stop growing at 256."""
    return float(torch.linalg.vector_norm(torch.ones(1, MOST_COLUMNS, dtype=torch.bfloat16), dim=1)) == 256.0  # noqa: PLR2004


@dataclass(frozen=True, slots=True, eq=False)
class DoraBound:
    """The bounds of steps 5 to 8. `products` is P of each row, `row_products` that of E; both float64.

    `share` and `narrow` are relative errors: of a merge in float32, and of bfloat16.
    """

    products: torch.Tensor
    row_products: torch.Tensor
    magnitude: torch.Tensor
    columns: int
    share: float
    narrow: float
    lost: float
    ceiling: float

    @classmethod
    @torch.no_grad()
    def of(cls, update: LowRankUpdate, dtype: torch.dtype, *, in_bfloat16: bool = False) -> DoraBound | None:
        """None if an intermediate value may leave the range of float32: then there is no proof."""
        assert update.magnitude is not None  # noqa: S101 - only DoRA comes here
        (rank, columns), scaling = update.lora_a.shape, abs(update.scaling)
        if rank > MOST_RANK or columns > MOST_COLUMNS or not 1 / MOST <= scaling <= MOST:
            return None
        rows = lengths(update.lora_b, 1)
        a, b = float(lengths(update.lora_a, 0).max()), float(rows.max())
        if not all(size <= MOST for size in (a, b, a * b, a * scaling, b * scaling, a * b * scaling)):  # also for NaN
            return None
        return cls(
            products=scaling * a * rows,
            row_products=scaling * float(lengths(update.lora_a, 1).norm()) * rows,
            magnitude=update.magnitude.double().abs(),
            columns=columns,
            share=(4 * rank + 32) * UNIT,
            narrow=unit(torch.bfloat16) if in_bfloat16 else 0.0,
            lost=2 * rank * LEAST * (1 + a + b + scaling),
            ceiling=LARGEST_SHARE * min(torch.finfo(dtype).max, torch.finfo(torch.float32).max),
        )

    def largest(self, rows: slice, peaks: torch.Tensor, norms: torch.Tensor) -> torch.Tensor | None:
        """Step 8 for rows, from their largest |t| and their ‖t‖. None if there is no proof."""
        peaks, norms = peaks.double(), norms.double()
        product, row_product, root = self.products[rows], self.row_products[rows], math.sqrt(self.columns)
        reach = self._reach(peaks, product) + ROUNDING_MARGIN * self.lost  # 5.
        share = (self.columns + 8) * UNIT
        most = norms * (1 + 2 * (share + self.narrow)) + root * LARGEST_FLUSHED
        row_reach = self._reach(most, row_product) + ROUNDING_MARGIN * root * self.lost  # 6.
        least = (norms * (1 - share - self.narrow) - row_reach) * (1 - share) - root * LARGEST_FLUSHED  # 7.
        factor = self.magnitude[rows] / least
        largest = ROW_MARGIN * factor * (peaks + reach) + LEAST * (1 + peaks)  # 8.
        proved = (2 * least > norms) & (peaks + product <= self.ceiling) & (factor <= MOST) & (largest <= self.ceiling)
        return largest if bool(proved.all()) else None

    def _reach(self, sums: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        """D from values, or E from norms: how far PEFT's sums can be from `sums`."""
        weight = 2 * (sums + product)  # at least every |W|, or ‖W‖
        in_bfloat16 = ROUNDING_MARGIN * 3 * self.narrow * product + self.narrow * sums
        return ROUNDING_MARGIN * (2 * self.share * (weight + product) + in_bfloat16)


ROW_MARGIN = 1 + 2.0**-20
"""Factor for the roundings of a quotient and of a product in float32."""


class DoraScreen:
    """The merge of a weight in one product."""

    def __init__(self, weight: torch.Tensor, update: LowRankUpdate, slices: Sequence[slice], buffers: Buffers) -> None:
        self._slices, self._buffers = slices, buffers
        self._weight, self._update = weight, update
        self._in_bfloat16 = weight.dtype == torch.bfloat16 and multiplies_bfloat16() and norms_are_summed_in_float32()
        self._bound = DoraBound.of(update, weight.dtype, in_bfloat16=self._in_bfloat16)

    @staticmethod
    def suits(weight: torch.Tensor, update: LowRankUpdate, slices: Sequence[slice]) -> bool:
        """Whether this can save work: DoRA with norms of rows, on a weight of enough blocks."""
        return weight.dtype in HALVES and not update.transposed and len(slices) >= LEAST_BLOCKS

    @torch.no_grad()
    def candidates(self) -> Candidates | None:
        """None if every block has to be merged as PEFT merges it."""
        bound = self._bound
        if bound is None:
            return None
        peaks, norms = self._rows(), self._rows()
        factors = Factors.of(self._update.lora_a, self._update.lora_b, transposed=False)
        for blocks, sums in summed(
            self._weight, factors, self._update.scaling, self._slices, self._buffers, in_bfloat16=self._in_bfloat16
        ):
            rows = slice(blocks[0].start, blocks[-1].stop)
            integers = _INTEGERS[sums.dtype]
            torch.linalg.vector_norm(sums, dim=1, out=norms[rows])  # 4.
            torch.amax(sums.abs_().view(integers), dim=1, out=peaks[rows].view(integers))
            if rows.start == 0 and self._is_wide(bound, rows, peaks[rows], norms[rows]):
                return None
        largest = bound.largest(slice(None), peaks, norms)
        if largest is None:
            return None
        reaches = [float(largest[rows].max()) for rows in self._slices]
        return Candidates([(0.0, 0.0)] * len(reaches), reaches, rounding_to(self._weight.dtype))

    def _rows(self) -> torch.Tensor:
        return torch.empty(len(self._weight), dtype=torch.bfloat16 if self._in_bfloat16 else torch.float32)

    def _is_wide(self, bound: DoraBound, rows: slice, peaks: torch.Tensor, norms: torch.Tensor) -> bool:
        """Whether most blocks would remain candidates, or there is no proof."""
        largest = bound.largest(rows, peaks, norms)
        return largest is None or bool(
            largest.sum() > (1 + WIDEST_REACH) * (bound.magnitude[rows] * peaks / norms).sum()
        )
