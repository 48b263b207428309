"""The merge of a low-rank update into one weight in blocks: a few rows at a time, with PEFT's bits.

In: a weight as the base holds it and a `LowRankUpdate`. Out: a `BlockMerge`, which gives the merged rows block by block
and never holds them all; figures.py reads figures off it. Knows torch and bitsandbytes: no PEFT,
no models, no files, no idea of what is good or bad. The weight is never written.

    delta.py    scaling · B @ A in blocks, and the proof that they have the bits of the whole
    dense.py    W + delta, DoRA's norms, PEFT's roundings
    screen.py   which blocks of a 16-bit weight have to be merged with these roundings, to know its extremes;
                dora_screen.py with DoRA's norms
    packed.py   bitsandbytes weights: dequantised, quantised again
    bound.py    what can be said of a merge without making it

What is not finite stays so: NaN and infinities travel through every step and are in the figures. One call works on one
core, if its thread says `torch.set_num_threads(1)`; threads.py spreads weights over the cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from merge_gate.engine.blocks.delta import FLOATS, HALVES, LowRankUpdate, is_plain
from merge_gate.engine.blocks.dense import DenseValues, Sum
from merge_gate.engine.blocks.dora_screen import DoraScreen
from merge_gate.engine.blocks.packed import Int4Values, Int8Values
from merge_gate.engine.blocks.screen import Candidates, Screen
from merge_gate.engine.tensors.buffers import Buffers
from merge_gate.engine.tensors.quantized import BNB_4BIT, is_quantized

Weight = DenseValues | Int8Values | Int4Values

SAMPLE_ROWS = 64
SAMPLE_ELEMENTS = 1 << 17
"""A sample has at least so many rows, and about so many elements."""

NARROW = (torch.float32, *HALVES)
"""Dtypes of a weight whose DoRA or quantised merge is made here; the others are rare, and PEFT's."""


class MergedRows(NamedTuple):
    """A block of a merge; the next one overwrites its tensors.

    `merged` are the rows `rows` of the merged weight, in its final dtype (dequantised, if it is quantised). `change` is
    by how much they would differ from the base's if nothing were rounded; None unless it was asked for.
    """

    rows: slice
    merged: torch.Tensor
    change: torch.Tensor | None


class BlockMerge:
    """The merge of one update into one weight. Iterate it as often as needed; `scales` are there after the first block.

    `scales` are those of the merged weight, by the suffixes of engine/tensors/quantized.py (`SCB`, `absmax`, …); none
    of a dense one.
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
        """Of the merged values: a quantised weight without DoRA is quantised again from the sum, in float32."""
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
        self.scales = again.settle()
        for rows in slices:
            change = summed.rows(rows, values.rows(rows), with_change=True)[1] if with_change else None
            yield MergedRows(rows, again.rows(rows), change)

    def unrounded_rows(self) -> Callable[[slice], torch.Tensor] | None:
        """Makes rows of a dense DoRA merge before their last rounding, to the weight's dtype, which keeps their order.

        None where more than that is rounded.
        """
        values, update = self._values, self._update
        if self.quantized or update.magnitude is None:
            return None
        summed = self._sum()
        return lambda rows: summed.unrounded(rows, values.rows(rows))

    def dense_rows(self, *, with_change: bool = False) -> Callable[[slice], MergedRows]:
        """Makes any of the `slices` of a dense weight."""
        values, summed = self._values, self._sum()
        return lambda rows: MergedRows(rows, *summed.rows(rows, values.rows(rows), with_change=with_change))

    def candidates(self) -> Candidates | None:
        """Which of the `slices` can hold the extremes of the merge; None where all of them have to be merged."""
        values, update, slices = self._values, self._update, self.slices
        if not isinstance(values, DenseValues):
            return None
        screen = Screen if update.magnitude is None else DoraScreen
        if not screen.suits(values.stored, update, values.dtype, slices):
            return None
        return screen(values.stored, update, values.dtype, slices, self._buffers).candidates()

    def extremes(self) -> tuple[torch.Tensor, bool] | None:
        """Of a quantised weight: the least and the greatest of the values that share a scale, all of them.

        And whether they show that a value has changed; if they do not, one may have. None where they have to be read
        off the blocks.
        """
        values, slices = self._values, self.slices
        extremes = None if isinstance(values, DenseValues) else values.extremes(self._requantized_from())
        if extremes is None:
            return None
        summed = self._sum()
        for rows in slices:
            extremes.put(rows, summed.rows(rows, values.rows(rows), with_change=False)[0])
        ends, self.scales = extremes.settle()
        changed = any(not torch.equal(extremes.of(values.rows(rows)).to(ends.dtype), ends[:, rows]) for rows in slices)
        return ends, changed

    def _sum(self) -> Sum:
        rounded = isinstance(self._values, DenseValues)
        return Sum(self._values, self._update, self.slices, self._buffers, rounded=rounded)

    def _requantized_from(self) -> torch.dtype:
        own = self._values.dtype
        return own if self._update.magnitude is not None else torch.promote_types(own, self._update.lora_a.dtype)

    def base(self, rows: slice) -> torch.Tensor:
        """The base's values that `merged` stands in place of."""
        return self._values.rows(rows)

    def sampled(self) -> BlockMerge | None:
        """The merge of rows spread evenly over the weight, at an odd stride; None where rows say nothing alone.

        Its products are not proved to have the bits of the whole; they may differ in the last bit of float32.
        """
        if self._update.transposed and self._update.magnitude is not None:
            return None
        rows, columns = self._values.shape
        step = max(rows // max(SAMPLE_ROWS, SAMPLE_ELEMENTS // columns), 1)
        step -= 1 - step % 2 if step > 1 else 0  # odd: an even one would meet the same place of every attention head
        return BlockMerge(self._values.sampled(step), self._update.sampled(step), self._buffers, sample_of=self.of)


def supports(
    weight: torch.Tensor,
    update: LowRankUpdate,
    *,
    row_scales: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> bool:
    """Whether `merged_blocks` can take these; what it refuses is for PEFT's own code.

    That is: other quantised, sparse or empty weights, factors of two dtypes, shapes that do not fit, rare dtypes.
    """
    return _values(weight, update, row_scales, dtype, Buffers()) is not None


def merged_blocks(
    weight: torch.Tensor,
    update: LowRankUpdate,
    buffers: Buffers,
    *,
    row_scales: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> BlockMerge:
    """The merge of `update` into `weight` as PEFT's `safe_merge=True` would leave it.

    Args:
        weight: (out, in), or (in, out) if the update is transposed: dense, or a parameter of bitsandbytes. Only read.
        update: its factors on the weight's device.
        buffers: the calling thread's; pass the same ones for all weights.
        row_scales: of an 8-bit weight (`SCB`).
        dtype: the dtype that the base would be loaded in, if it is not the weight's own; dense weights only.

    Raises:
        ValueError: `supports` is false of these.
    """
    values = _values(weight, update, row_scales, dtype, buffers)
    if values is None:
        a, b = update.lora_a, update.lora_b
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (weight, a, b))
        raise ValueError(f"not a low-rank update of a weight that can be merged in blocks: got {shapes}")
    return BlockMerge(values, update, buffers)


def _values(
    weight: torch.Tensor,
    update: LowRankUpdate,
    row_scales: torch.Tensor | None,
    dtype: torch.dtype | None,
    buffers: Buffers,
) -> Weight | None:
    if not update.well_formed or weight.device != update.lora_a.device:
        return None
    values: Weight | None = None
    if is_plain(weight) and weight.dim() == 2 and (dtype or weight.dtype) in FLOATS:  # noqa: PLR2004
        values = DenseValues(weight, buffers, dtype)
    elif is_quantized(weight) and dtype is None and not update.transposed:
        is_4bit = type(weight).__name__ == BNB_4BIT
        values = Int4Values.of(weight) if is_4bit else Int8Values.of(weight, row_scales)
    if values is None or values.shape != update.shape:
        return None
    if isinstance(values, DenseValues) and update.magnitude is None:
        return values
    magnitude = update.magnitude if update.magnitude is not None else update.lora_a
    wide = update.lora_a.dtype is magnitude.dtype is torch.float32
    return values if wide and values.dtype in NARROW else None
