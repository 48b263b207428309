"""The figures of a merge in blocks: extremes, whether a value changed, and the loss by rounding.

In: a `BlockMerge` of all rows or of a sample. Out: `Measured`. Each block is merged, read, and dropped. Knows torch and
no PEFT; judges nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from merge_gate.engine.blocks.block_merge import BlockMerge, MergedRows
from merge_gate.engine.blocks.delta import HALVES
from merge_gate.engine.blocks.screen import Candidates, Ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What rounding does to a merge. A sum is NaN or infinite if a summand is not finite.

    `unchanged` counts elements that kept their value. `delta_sq` is ‖delta‖² before rounding, `lost_sq` is
    ‖merged - (W + delta)‖², `base_sq` is ‖W‖². For a quantized weight, W and merged are the dequantized values.
    """

    unchanged: int
    delta_sq: float
    lost_sq: float
    base_sq: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The figures of a merged weight, in its final dtype.

    `numel` of the weight's `of` elements were merged, and the figures are of these. `minimum` and `maximum` are NaN if
    one element is NaN. `changed`: one of them changed its value (-0.0 and 0.0 are the same value). `figures` is None
    unless asked for. `scales` has the least and the greatest value of each scale of a quantized weight.
    """

    numel: int
    of: int
    minimum: float
    maximum: float
    changed: bool
    figures: Figures | None
    scales: tuple[tuple[str, float, float], ...]

    @property
    def estimated(self) -> bool:
        """Whether the figures come from a sample."""
        return self.numel < self.of

    @property
    def finite(self) -> bool:
        bounds = [self.minimum, self.maximum, *(bound for _, *both in self.scales for bound in both)]
        return all(map(math.isfinite, bounds))

    @property
    def max_abs(self) -> float:
        """NaN if an extreme is NaN."""
        return max(-self.minimum, self.maximum)


@torch.no_grad()
def measure_merge(
    merge: BlockMerge,
    *,
    figures: bool = False,
    receive: Callable[[MergedRows], None] | None = None,
    with_change: bool = False,
) -> Measured:
    """Merge every row and measure it. The figures cost more than the merge.

    Without figures, the rows of a 16-bit weight that cannot hold an extreme are merged and measured in one product
    (screen.py). With `receive`, each row is merged with PEFT's roundings, measured, and passed on.
    With `with_change`, each row has its unrounded change, too.
    """
    tally = _Tally(merge, figures=figures)
    if receive is not None:
        for block in merge.blocks(with_change=figures or with_change):
            receive(block)
            tally.add(block)
        return tally.result()
    extremes = None if figures else merge.extremes()
    if extremes is not None and extremes[1]:
        tally.add_extremes(extremes[0])
        return tally.result()
    candidates = None if figures else merge.candidates()
    if candidates is not None:
        tally.add_candidates(candidates)
        return tally.result()
    unrounded = None if figures else merge.unrounded_rows()
    if unrounded is not None:
        tally.add_unrounded(unrounded)
        return tally.result()
    for block in merge.blocks(with_change=figures):
        tally.add(block)
    return tally.result()


@dataclass(slots=True)
class _Tally:
    """Figures gathered block by block. They stay on the device until `result`."""

    merge: BlockMerge
    figures: bool
    bounds: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    sums: list[torch.Tensor] = field(default_factory=list)
    numel: int = 0
    changed: bool = False

    def add(self, block: MergedRows) -> None:
        merged = block.merged
        self.bounds.append(torch.aminmax(merged))
        self.numel += merged.numel()
        if self.figures:
            self.sums.append(self._sums(block))
        elif not self.changed:
            self.changed = _differ(merged, self.merge.base(block.rows))

    def add_extremes(self, ends: torch.Tensor) -> None:
        self.bounds.append((ends[0].min(), ends[1].max()))
        self.numel, self.changed = self.merge.numel, True

    def add_unrounded(self, made: Callable[[slice], torch.Tensor]) -> None:
        """The extremes of all blocks, rounded afterwards. That gives the same, because rounding keeps the order."""
        for rows in self.merge.slices:
            values = made(rows)
            least, greatest = (end.to(self.merge.dtype) for end in torch.aminmax(values))
            self.bounds.append((least, greatest))
            self.numel += values.numel()
            if not self.changed:
                self.changed = _differ(values.to(self.merge.dtype), self.merge.base(rows))

    def add_candidates(self, candidates: Candidates) -> None:
        """The blocks that may hold an extreme, and then more blocks until one of them has changed a value."""
        made, slices, seen = self.merge.dense_rows(), self.merge.slices, set()

        def add(number: int) -> Ends:
            seen.add(number)
            self.add(made(slices[number]))
            return float(self.bounds[-1][0]), float(self.bounds[-1][1])

        candidates.visit(add)
        for number in range(len(slices)):
            if self.changed:
                break
            if number not in seen:
                add(number)
        self.numel = self.merge.numel

    def _sums(self, block: MergedRows) -> torch.Tensor:
        base, change = self.merge.base(block.rows), block.change
        assert change is not None  # noqa: S101 - `figures` asks for it
        wide = torch.float32 if self.merge.quantized or base.dtype in HALVES else torch.float64
        base = base.to(wide)
        moved = block.merged.to(wide, copy=True).sub_(base)
        moves = torch.count_nonzero(moved.add_(0.0).view(_INTEGERS[wide])).double()  # -0.0 counts as 0.0
        return torch.stack((moves, _sum_sq(change), _sum_sq(moved.sub_(change)), _sum_sq(base)))

    def result(self) -> Measured:
        low, high = _reduced(self.bounds)
        figures, changed = None, self.changed
        if self.figures:
            moves, delta_sq, lost_sq, base_sq = torch.stack(self.sums).sum(0).tolist()
            unchanged, changed = self.numel - int(moves), moves > 0
            figures = Figures(unchanged=unchanged, delta_sq=delta_sq, lost_sq=lost_sq, base_sq=base_sq)
        scales = tuple((name, *torch.stack(torch.aminmax(part)).tolist()) for name, part in self.merge.scales.items())
        return Measured(
            numel=self.numel,
            of=self.merge.of,
            minimum=low,
            maximum=high,
            changed=changed,
            figures=figures,
            scales=scales,
        )


def _differ(merged: torch.Tensor, base: torch.Tensor) -> bool:
    """Whether any value differs; -0.0 is 0.0. Bits are compared first, which is many times faster if all are equal."""
    if merged.dtype == base.dtype and merged.element_size() == 2 and torch.equal(_bits(merged), _bits(base)):  # noqa: PLR2004
        return False
    return not torch.equal(merged, base.to(merged.dtype))


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int16)


def _reduced(bounds: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, float]:
    """The least and the greatest of (low, high) pairs; NaN if one is NaN."""
    lows, highs = zip(*bounds, strict=True)
    return torch.stack(lows).min().item(), torch.stack(highs).max().item()


_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
"""torch counts zeros among integers in half the time."""

SAFE_SQUARES = (2.0**-80, 2.0**100)
"""A sum of float32 squares between these is exact enough: a square that float32 flushes to zero is below 2⁻¹²⁶."""


def _sum_sq(values: torch.Tensor) -> torch.Tensor:
    """Σx², with the rows summed in float64. If squares leave the range of float32, all are taken in float64."""
    if values.dtype is torch.float32 and values.device.type == "cpu":
        total: torch.Tensor = torch.linalg.vector_norm(values, dim=1).double().square().sum()
        if SAFE_SQUARES[0] < float(total) < SAFE_SQUARES[1]:
            return total
    norm: torch.Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
    return norm.square()
