"""The merge of an update into dense values: blocks of rows, with PEFT's roundings in PEFT's order.

In: the values of a weight, a block of rows at a time, and an update. Out: the same rows, merged. Knows nothing of how
a weight is stored, of PEFT, of models or files.

PEFT does this with whole tensors and `safe_merge=True` (peft/tuners/lora/layer.py, variants.py, dora.py, bnb.py):

    LoRA                        W + delta.to(W.dtype)
    LoRA on a quantized weight  W + delta                                   in float32, before it is quantized again
    DoRA                        (magnitude / norm * (W + delta)).to(W.dtype), with norm = ‖W + delta‖ of each output

Everything except the norm works element by element. The norm of a row is a reduction, and torch may use another kernel
for a block. So each shape is proved, as in delta.py. The outputs of a transposed weight are columns, and their norms
take a first pass, in blocks of columns.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch

from merge_gate.engine.blocks.delta import ONE_PROOF_AT_A_TIME, Delta, LowRankUpdate
from merge_gate.engine.tensors.buffers import Buffers

PATTERN_ELEMENTS = (1 << 16) - 15
"""Length of the pseudo-random sequence that a proof of norms repeats. It is odd, so that no two rows are equal."""


class Values(Protocol):
    """The values of a weight as PEFT reads them."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    def rows(self, rows: slice) -> torch.Tensor:
        """These rows. The next call may overwrite them."""
        ...


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


class Sum:
    """W + delta, a block of rows at a time, in the dtype in which PEFT adds; for DoRA, with its magnitude.

    Args:
        values: W.
        update: the update that is merged into W.
        blocks: the slices that `rows` will be called with.
        buffers: those of the calling thread.
        rounded: whether the result has W's dtype. It has not if a quantized weight is quantized again.
    """

    def __init__(
        self, values: Values, update: LowRankUpdate, blocks: tuple[slice, ...], buffers: Buffers, *, rounded: bool
    ) -> None:
        self._values, self._update, self._buffers, self._rounded = values, update, buffers, rounded
        self._delta = Delta(update, blocks, buffers)
        self._norms = None if update.magnitude is None else _Norms(values, update, self._delta, blocks, buffers)

    def rows(self, rows: slice, base: torch.Tensor, *, with_change: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """These rows of the sum, and their unrounded difference from W (None if it was not asked for)."""
        delta = self._delta.block(rows)
        if self._norms is None:
            return self._added(base, delta), delta if with_change else None
        exact = self._scaled(rows, base, delta, self._norms, self._wide(base, delta))
        merged = self._narrow(exact, base.dtype)
        return merged, torch.sub(exact, base, out=delta) if with_change and delta.dtype == exact.dtype else None

    def unrounded(self, rows: slice, base: torch.Tensor) -> torch.Tensor:
        """These rows of DoRA's sum in the dtype in which PEFT computes them."""
        assert self._norms is not None  # noqa: S101 - only for DoRA; LoRA rounds its delta
        delta = self._delta.block(rows)
        in_place = self._delta.blocks_are_writable and torch.result_type(base, delta) == delta.dtype
        return self._scaled(rows, base, delta, self._norms, delta if in_place else self._wide(base, delta))

    @staticmethod
    def _scaled(rows: slice, base: torch.Tensor, delta: torch.Tensor, norms: _Norms, out: torch.Tensor) -> torch.Tensor:
        exact = torch.add(base, delta, out=out)
        return exact.mul_(norms.factor(rows, exact))

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
        self, values: Values, update: LowRankUpdate, delta: Delta, blocks: tuple[slice, ...], buffers: Buffers
    ) -> None:
        assert update.magnitude is not None  # noqa: S101 - only DoRA has norms
        self._magnitude, self._transposed = update.magnitude.detach(), update.transposed
        self._norms: torch.Tensor | None = None
        if update.transposed:
            assert isinstance(values, DenseValues)  # noqa: S101 - no quantised weight is transposed
            self._norms = _column_norms(values, update, buffers)
        elif not _provable(values, blocks, transposed=False):
            self._norms = _norms_of(torch.cat([values.rows(rows) + delta.block(rows) for rows in blocks]))

    def factor(self, rows: slice, summed: torch.Tensor) -> torch.Tensor:
        if self._norms is None:
            return (self._magnitude[rows] / _norms_of(summed)).view(-1, 1)
        if self._transposed:
            return (self._magnitude / self._norms).view(1, -1)
        return (self._magnitude[rows] / self._norms[rows]).view(-1, 1)


def _norms_of(summed: torch.Tensor) -> torch.Tensor:
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
    return torch.cat([_norms_of(values.columns(part).T + delta.block(part)) for part in columns])


def _provable(values: Values, blocks: tuple[slice, ...], *, transposed: bool) -> bool:
    with ONE_PROOF_AT_A_TIME:
        return len(blocks) > 1 and _norms_proved(
            rows=values.shape[0],
            columns=values.shape[1],
            dtype=values.dtype,
            transposed=transposed,
            starts=tuple(block.start for block in blocks),
            threads=torch.get_num_threads(),
        )


@functools.cache
def _norms_proved(
    *, rows: int, columns: int, dtype: torch.dtype, transposed: bool, starts: tuple[int, ...], threads: int
) -> bool:
    """Whether norms of blocks have the bits of the norms of the whole. The result is a property of this machine."""
    del threads  # part of the key, because the bits could depend on it
    blocks = [slice(*ends) for ends in zip(starts, (*starts[1:], None), strict=True)]
    weight = _pattern(rows, columns).to(dtype)
    if transposed:
        delta = _pattern(columns, rows)
        whole = _norms_of(weight.T + delta)
        made = [_norms_of(weight[:, part].contiguous().T + delta[part]) for part in blocks]
    else:
        delta = _pattern(rows, columns)
        whole = _norms_of(weight + delta)
        made = [_norms_of(weight[part] + delta[part]) for part in blocks]
    return torch.equal(torch.cat(made), whole)


def _pattern(rows: int, columns: int) -> torch.Tensor:
    numbers = torch.randn(PATTERN_ELEMENTS, generator=torch.Generator().manual_seed(0))
    return numbers.repeat(rows * columns // PATTERN_ELEMENTS + 1)[: rows * columns].view(rows, columns)
