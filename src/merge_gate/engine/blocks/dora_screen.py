"""The blocks of a DoRA merge that can hold its least and greatest values: screen.py with a factor for each row.

In: a dense 16-bit weight and an update with a magnitude, in blocks of rows. Out: the blocks that have to be merged as
PEFT merges them to know the extremes of the whole merge. Knows torch: no PEFT, no models, no files; judges nothing.

PEFT computes S = W + delta in float32 and N = ‖S‖ of each row. It rounds magnitude / N · S once, to the weight's dtype.
Let t be the sums of step 1 in screen.py. For each row, in float64:

1. Take its largest |t|, and ‖t‖. NaN and infinities appear in both.
2. |S - t| <= D for its elements. D is the bound of screen.py, except that PEFT does not round the delta of a DoRA.
3. ‖S - t‖ <= E for the row. E is the same bound with norms in place of values.
4. A norm of n values, summed in float32 in any order, has a relative error of at most n · 2⁻²⁴. Rounding it to bfloat16
   adds u. So N is at least ‖t‖ - E, less these shares.
5. No absolute value of the row exceeds |magnitude| / N · (|t| + D) before it is rounded. This one number bounds both
   ends of a block.

There is no proof if a value comes near the limit of a dtype, or if a norm may vanish.
"""

# D of step 2, with u, r, and W as in screen.py, and P = |scaling| · ‖b‖ · longest column of A:
#
#   float32, in both merges           2 · (4 r + 32) · 2⁻²⁴ · (|W| + P)
#   bfloat16, if step 1 uses it       3 u · P for factors and product, u · |t| for the sum
#   below the least normal number     everything there is lost
#
# E of step 3: the error of an element is at most a share of Σ|b||a|, and the norm of these sums over a row is at most
# |scaling| · ‖b‖ · ‖A‖, with A's Frobenius norm. So E is D with this product in place of P, and norms of rows for |W|.

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from merge_gate.engine.blocks.delta import HALVES, Factors, LowRankUpdate
from merge_gate.engine.blocks.screen import (
    LARGEST_FLUSHED,
    LARGEST_SHARE,
    LEAST,
    LEAST_BLOCKS,
    MOST,
    MOST_RANK,
    ROUNDING_MARGIN,
    UNIT,
    WIDEST_REACH,
    Candidates,
    lengths,
    multiplies_bfloat16,
    rounding_to,
    summed,
    unit,
)
from merge_gate.engine.tensors.buffers import Buffers

MOST_COLUMNS = 1 << 16
"""Up to this number of columns, the shares of step 4 are below a hundredth."""

_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
"""Absolute values have the order of their bits, with NaN above infinity. Comparing integers takes half the time."""


@functools.cache
def norms_are_summed_in_float32() -> bool:
    """Whether torch sums squares of bfloat16 in float32. A sum in bfloat16 would stop growing at 256."""
    return float(torch.linalg.vector_norm(torch.ones(1, MOST_COLUMNS, dtype=torch.bfloat16), dim=1)) == 256.0  # noqa: PLR2004


@dataclass(frozen=True, slots=True, eq=False)
class DoraBound:
    """The bounds of steps 2 to 5. `products` is P of each row, `row_products` that of E; both float64.

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
        """Step 5 for rows, from their largest |t| and their ‖t‖. None if there is no proof."""
        peaks, norms = peaks.double(), norms.double()
        product, row_product, root = self.products[rows], self.row_products[rows], math.sqrt(self.columns)
        reach = self._reach(peaks, product) + ROUNDING_MARGIN * self.lost  # 2.
        share = (self.columns + 8) * UNIT
        most = norms * (1 + 2 * (share + self.narrow)) + root * LARGEST_FLUSHED
        row_reach = self._reach(most, row_product) + ROUNDING_MARGIN * root * self.lost  # 3.
        least = (norms * (1 - share - self.narrow) - row_reach) * (1 - share) - root * LARGEST_FLUSHED  # 4.
        factor = self.magnitude[rows] / least
        largest = ROW_MARGIN * factor * (peaks + reach) + LEAST * (1 + peaks)  # 5.
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
        """Whether this can save work: a DoRA whose norms are those of rows, on a weight of enough blocks."""
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
            torch.linalg.vector_norm(sums, dim=1, out=norms[rows])  # 1.
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
