"""The merge of a low-rank update into one weight in blocks: a few rows at a time, with PEFT's bits.

In: a weight as the base holds it, and a `LowRankUpdate`. Out: a `BlockMerge`, which makes the merged rows block by
block and never holds them all; figures.py measures them. Knows torch and bitsandbytes: no PEFT, no models, no files. It
judges nothing, and never writes to the weight.

- delta.py: scaling · B @ A in blocks, and the proof that they have the bits of the whole.
- dense.py: W + delta, DoRA's norms, PEFT's roundings.
- screen.py: the blocks of a 16-bit weight that need these roundings to know its extremes; dora_screen.py for DoRA.
- packed.py: bitsandbytes weights, dequantized and quantized again.
- bound.py: a bound on the values of a merge, without the merge.

NaN and infinities pass through every step and appear in the figures. One call works on one core, if its thread has
called `torch.set_num_threads(1)`; threads.py spreads weights over the cores.
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
        self.scales = again.settle()
        for rows in slices:
            change = summed.rows(rows, values.rows(rows), with_change=True)[1] if with_change else None
            yield MergedRows(rows, again.rows(rows), change)

    def unrounded_rows(self) -> Callable[[slice], torch.Tensor] | None:
        """Makes rows of a dense DoRA merge before their only rounding, to the weight's dtype, which keeps their order.

        None for other merges, which round more than once.
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


def supports(weight: torch.Tensor, update: LowRankUpdate, *, row_scales: torch.Tensor | None = None) -> bool:
    """Whether `merged_blocks` accepts these. PEFT's own code merges the rest.

    The rest is: other quantized weights, sparse or empty weights, factors of two dtypes, shapes that do not fit, and
    rare dtypes.
    """
    return _values(weight, update, row_scales) is not None


def merged_blocks(
    weight: torch.Tensor, update: LowRankUpdate, buffers: Buffers, *, row_scales: torch.Tensor | None = None
) -> BlockMerge:
    """The merge of `update` into `weight` as PEFT's `safe_merge=True` would leave it.

    Args:
        weight: (out, in), or (in, out) if the update is transposed. Dense, or a parameter of bitsandbytes. Only read.
        update: the update, with its factors on the weight's device.
        buffers: the calling thread's. Pass the same ones for all weights.
        row_scales: the scales of an 8-bit weight (`SCB`).

    Raises:
        ValueError: `supports` returns false for these.
    """
    values = _values(weight, update, row_scales)
    if values is None:
        a, b = update.lora_a, update.lora_b
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (weight, a, b))
        raise ValueError(f"not a low-rank update of a weight that can be merged in blocks: got {shapes}")
    return BlockMerge(values, update, buffers)


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
