"""The merge of a low-rank update into one weight in blocks: a few rows at a time, with PEFT's bits, and its figures.

In: a weight as the base holds it, and a `LowRankUpdate`. Out: a `BlockMerge`, which makes the merged rows block by
block and never holds them all, and what is `Measured` of it. Knows torch and bitsandbytes: no PEFT, no models, no
files. It judges nothing, and never writes to the weight.

- delta.py: scaling · B @ A in blocks, and the proof that they have the bits of the whole.
- screen.py: the blocks of a 16-bit weight that need PEFT's roundings to know its extremes.
- packed.py: bitsandbytes weights, dequantized and quantized again.

NaN and infinities pass through every step and appear in the figures. One call works on one core, if its thread has
called `torch.set_num_threads(1)`; threads.py spreads weights over the cores.

PEFT merges whole tensors with `safe_merge=True` (peft/tuners/lora/layer.py, variants.py, dora.py, bnb.py):

    LoRA                        W + delta.to(W.dtype)
    LoRA on a quantized weight  W + delta                                   in float32, before it is quantized again
    DoRA                        (magnitude / norm * (W + delta)).to(W.dtype), with norm = ‖W + delta‖ of each output

Everything except the norm works element by element. The norm of a row is a reduction, and torch may use another kernel
for a block. So each shape is proved, as in delta.py. The outputs of a transposed weight are columns, and their norms
take a first pass, in blocks of columns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from merge_gate.engine.blocks.delta import FLOATS, HALVES, ONE_PROOF_AT_A_TIME, Delta, LowRankUpdate, is_plain
from merge_gate.engine.blocks.packed import Int4Values, Int8Values
from merge_gate.engine.blocks.screen import Candidates, DoraScreen, Ends, Screen
from merge_gate.engine.tensors.quantized import BNB_4BIT, is_quantized
from merge_gate.engine.tensors.threads import Buffers

PATTERN_ELEMENTS = (1 << 16) - 15
"""Length of the pseudo-random sequence that a proof of norms repeats. It is odd, so that no two rows are equal."""


class DenseValues:
    """A plain weight."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight.detach()
        self.shape, self.device, self.dtype = (weight.shape[0], weight.shape[1]), weight.device, weight.dtype

    def rows(self, rows: slice) -> torch.Tensor:
        return self.weight[rows]

    def sampled(self, step: int) -> DenseValues:
        return DenseValues(self.weight[::step])

    def columns(self, columns: slice) -> torch.Tensor:
        return self.weight[:, columns].contiguous()


Weight = DenseValues | Int8Values | Int4Values


class Sum:
    """W + delta, a block of rows at a time, in the dtype in which PEFT adds; for DoRA, with its magnitude.

    Args:
        values: W.
        update: the update that is merged into W.
        blocks: the slices that `rows` will be called with.
        buffers: those of the calling thread.
        rounded: whether the result has W's dtype. False if a quantized weight is quantized again.
    """

    def __init__(
        self, values: Weight, update: LowRankUpdate, blocks: tuple[slice, ...], buffers: Buffers, *, rounded: bool
    ) -> None:
        self._values, self._update, self._buffers, self._rounded = values, update, buffers, rounded
        self._delta = Delta(update, blocks, buffers)
        self._norms = None if update.magnitude is None else _Norms(values, update, self._delta, blocks, buffers)

    def rows(self, rows: slice, base: torch.Tensor, *, with_change: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """These rows of the sum, and their unrounded difference from W (None if it was not asked for)."""
        delta = self._delta.block(rows)
        if self._norms is None:
            return self._added(base, delta), delta if with_change else None
        exact = torch.add(base, delta, out=self._wide(base, delta))
        exact.mul_(self._norms.factor(rows, exact))
        merged = self._narrow(exact, base.dtype)
        return merged, torch.sub(exact, base, out=delta) if with_change and delta.dtype == exact.dtype else None

    def _wide(self, base: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        return self._buffers.take("sum", base, torch.result_type(base, delta))

    def _added(self, base: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        if not self._rounded:
            return torch.add(base, delta, out=self._wide(base, delta))
        return torch.add(base, self._narrow(delta, base.dtype), out=self._buffers.take("merged", base, base.dtype))

    def _narrow(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return values if values.dtype == dtype else self._buffers.take("narrow", values, dtype).copy_(values)


class _Norms:
    """magnitude / ‖W + delta‖ of each output, shaped to multiply rows of the stored weight."""

    def __init__(
        self, values: Weight, update: LowRankUpdate, delta: Delta, blocks: tuple[slice, ...], buffers: Buffers
    ) -> None:
        assert update.magnitude is not None  # noqa: S101 - only DoRA has norms
        self._magnitude, self._transposed = update.magnitude.detach(), update.transposed
        self._norms: torch.Tensor | None = None
        if update.transposed:
            assert isinstance(values, DenseValues)  # noqa: S101 - no quantized weight is transposed
            self._norms = _column_norms(values, update, buffers)
        elif not _provable(values, blocks, transposed=False):
            self._norms = norms_of(torch.cat([values.rows(rows) + delta.block(rows) for rows in blocks]))

    def factor(self, rows: slice, summed: torch.Tensor) -> torch.Tensor:
        if self._norms is None:
            return (self._magnitude[rows] / norms_of(summed)).view(-1, 1)
        if self._transposed:
            return (self._magnitude / self._norms).view(1, -1)
        return (self._magnitude[rows] / self._norms[rows]).view(-1, 1)


def norms_of(summed: torch.Tensor) -> torch.Tensor:
    """PEFT's own expression (`get_weight_norm`) for (out, in)."""
    norms: torch.Tensor = torch.linalg.norm(summed, dim=1)
    return norms


def _column_norms(values: DenseValues, update: LowRankUpdate, buffers: Buffers) -> torch.Tensor:
    """The norms of the columns of a transposed weight, which are its outputs."""
    straight = LowRankUpdate(lora_a=update.lora_a, lora_b=update.lora_b, scaling=update.scaling)
    columns = buffers.blocks(values.shape[1], values.shape[0], values.device)
    if not _provable(values, columns, transposed=True):
        columns = (slice(0, values.shape[1]),)
    delta = Delta(straight, columns, buffers)
    return torch.cat([norms_of(values.columns(part).T + delta.block(part)) for part in columns])


def _provable(values: Weight, blocks: tuple[slice, ...], *, transposed: bool) -> bool:
    with ONE_PROOF_AT_A_TIME:
        return len(blocks) > 1 and norms_proved(
            rows=values.shape[0],
            columns=values.shape[1],
            dtype=values.dtype,
            transposed=transposed,
            starts=tuple(block.start for block in blocks),
            threads=torch.get_num_threads(),
        )


@functools.cache
def norms_proved(
    *, rows: int, columns: int, dtype: torch.dtype, transposed: bool, starts: tuple[int, ...], threads: int
) -> bool:
    """Whether norms of blocks have the bits of the norms of the whole. The result is a property of this machine."""
    del threads  # part of the key, because the bits could depend on it
    blocks = [slice(*ends) for ends in zip(starts, (*starts[1:], None), strict=True)]
    weight = _pattern(rows, columns).to(dtype)
    if transposed:
        delta = _pattern(columns, rows)
        whole = norms_of(weight.T + delta)
        made = [norms_of(weight[:, part].contiguous().T + delta[part]) for part in blocks]
    else:
        delta = _pattern(rows, columns)
        whole = norms_of(weight + delta)
        made = [norms_of(weight[part] + delta[part]) for part in blocks]
    return torch.equal(torch.cat(made), whole)


def _pattern(rows: int, columns: int) -> torch.Tensor:
    numbers = torch.randn(PATTERN_ELEMENTS, generator=torch.Generator().manual_seed(0))
    return numbers.repeat(rows * columns // PATTERN_ELEMENTS + 1)[: rows * columns].view(rows, columns)


SAMPLE_ROWS = 64
SAMPLE_ELEMENTS = 1 << 17
"""A sample has at least `SAMPLE_ROWS` rows, and about `SAMPLE_ELEMENTS` elements."""

NARROW = (torch.float32, *HALVES)
"""Dtypes of a weight for DoRA and for quantized merges. PEFT merges the other dtypes, which are rare."""


class MergedRows(NamedTuple):
    """A block of a merge. The next block overwrites its tensors.

    `merged` holds the rows `rows` of the merged weight, in its final dtype, dequantized if necessary. `change` is their
    unrounded difference from the base; None unless asked for.
    """

    rows: slice
    merged: torch.Tensor
    change: torch.Tensor | None


class BlockMerge:
    """The merge of one update into one weight. It can be iterated more than once.

    `scales` is filled with the first block: the scales of the merged weight, by the suffixes of
    engine/tensors/quantized.py (`SCB`, `absmax`, …). A dense weight has none.
    """

    def __init__(
        self, values: Weight, update: LowRankUpdate, buffers: Buffers, *, sample_of: int | None = None
    ) -> None:
        self._values, self._update, self._buffers = values, update, buffers
        self.numel = values.shape[0] * values.shape[1]
        self.of = sample_of or self.numel
        self.quantized = not isinstance(values, DenseValues)
        self.dtype = self._final_dtype()
        self.scales: dict[str, torch.Tensor] = {}

    def _final_dtype(self) -> torch.dtype:
        """The dtype of the merged values. A quantized weight without DoRA is quantized again from a float32 sum."""
        if not self.quantized or self._update.magnitude is not None:
            return self._values.dtype
        return torch.promote_types(self._values.dtype, self._update.lora_a.dtype)

    def __iter__(self) -> Iterator[MergedRows]:
        return self.blocks()

    @property
    def slices(self) -> tuple[slice, ...]:
        return self._buffers.blocks(*self._values.shape, self._values.device)

    def blocks(self, *, with_change: bool = False) -> Iterator[MergedRows]:
        """The merged rows, from the first to the last."""
        values, slices = self._values, self.slices
        if isinstance(values, DenseValues):
            made = self.dense_rows(with_change=with_change)
            yield from map(made, slices)
            return
        summed = self._sum()
        again = values.requantized(self._requantized_from())
        for rows in slices:
            again.put(rows, summed.rows(rows, values.rows(rows), with_change=False)[0])
        self.scales = again.finish()
        for rows in slices:
            change = summed.rows(rows, values.rows(rows), with_change=True)[1] if with_change else None
            yield MergedRows(rows, again.rows(rows), change)

    def dense_rows(self, *, with_change: bool = False) -> Callable[[slice], MergedRows]:
        """Makes any of the `slices` of a dense weight."""
        values, summed = self._values, self._sum()
        return lambda rows: MergedRows(rows, *summed.rows(rows, values.rows(rows), with_change=with_change))

    def candidates(self) -> Candidates | None:
        """The `slices` that can hold the extremes of the merge; None if all of them have to be merged."""
        values, update, slices = self._values, self._update, self.slices
        if not isinstance(values, DenseValues):
            return None
        screen = Screen if update.magnitude is None else DoraScreen
        if not screen.suits(values.weight, update, slices):
            return None
        return screen(values.weight, update, slices, self._buffers).candidates()

    def extremes(self) -> tuple[torch.Tensor, bool] | None:
        """For a quantized weight: the least and the greatest value for every scale, and whether these show a change.

        If they show none, another value may still have changed. None if the extremes have to be read from the blocks.
        """
        values, slices = self._values, self.slices
        extremes = None if isinstance(values, DenseValues) else values.extremes(self._requantized_from())
        if extremes is None:
            return None
        summed = self._sum()
        for rows in slices:
            extremes.put(rows, summed.rows(rows, values.rows(rows), with_change=False)[0])
        ends, self.scales = extremes.finish()
        changed = any(not torch.equal(extremes.of(values.rows(rows)).to(ends.dtype), ends[:, rows]) for rows in slices)
        return ends, changed

    def _sum(self) -> Sum:
        rounded = isinstance(self._values, DenseValues)
        return Sum(self._values, self._update, self.slices, self._buffers, rounded=rounded)

    def _requantized_from(self) -> torch.dtype:
        own = self._values.dtype
        return own if self._update.magnitude is not None else torch.promote_types(own, self._update.lora_a.dtype)

    def base(self, rows: slice) -> torch.Tensor:
        """The base's values for these rows."""
        return self._values.rows(rows)

    def sampled(self) -> BlockMerge | None:
        """The merge of rows that are spread evenly over the weight, at an odd stride; None if a row needs the others.

        Its products are not proved to have the bits of the whole. They may differ in the last bit of float32.
        """
        if self._update.transposed and self._update.magnitude is not None:
            return None
        rows, columns = self._values.shape
        step = max(rows // max(SAMPLE_ROWS, SAMPLE_ELEMENTS // columns), 1)
        step -= 1 - step % 2 if step > 1 else 0  # an even step would meet the same row of every attention head
        return BlockMerge(self._values.sampled(step), self._update.sampled(step), self._buffers, sample_of=self.of)


def merged_blocks(
    weight: torch.Tensor, update: LowRankUpdate, buffers: Buffers, *, row_scales: torch.Tensor | None = None
) -> BlockMerge | None:
    """The merge of `update` into `weight` as PEFT's `safe_merge=True` would leave it. None if PEFT has to merge it.

    PEFT merges other quantized weights, sparse or empty weights, factors of two dtypes, shapes that do not fit, and
    rare dtypes.

    Args:
        weight: (out, in), or (in, out) if the update is transposed. Dense, or a parameter of bitsandbytes. Only read.
        update: the update, with its factors on the weight's device.
        buffers: the calling thread's. Pass the same ones for all weights.
        row_scales: the scales of an 8-bit weight (`SCB`).
    """
    values = _values(weight, update, row_scales)
    return None if values is None else BlockMerge(values, update, buffers)


def _values(weight: torch.Tensor, update: LowRankUpdate, row_scales: torch.Tensor | None) -> Weight | None:
    if not update.well_formed or weight.device != update.lora_a.device:
        return None
    values: Weight | None = None
    if is_plain(weight) and weight.dim() == 2 and weight.dtype in FLOATS:  # noqa: PLR2004
        values = DenseValues(weight)
    elif is_quantized(weight) and not update.transposed:
        is_4bit = type(weight).__name__ == BNB_4BIT
        values = Int4Values.of(weight) if is_4bit else Int8Values.of(weight, row_scales)
    if values is None or values.shape != update.shape:
        return None
    if isinstance(values, DenseValues) and update.magnitude is None:
        return values
    magnitude = update.magnitude if update.magnitude is not None else update.lora_a
    wide = update.lora_a.dtype is magnitude.dtype is torch.float32
    return values if wide and values.dtype in NARROW else None


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
