"""One tensor in, its `TensorStats` out. The hot loop. It knows nothing about PEFT, models, or limits.

The common case costs one pass: `torch.aminmax` reads a tensor once and carries NaN and both infinities to its result
(an `amax` alone misses −Inf; `isfinite().all()` is an order of magnitude slower on CPU in bfloat16). Counts and the
first index are taken only where that pass says non-finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from merge_gate.records.measured import TensorStats
from merge_gate.records.refusals import CannotJudge

CHUNK_ELEMENTS = 1 << 22
"""Elements per step of the slow pass: bounds its own memory (masks and widened copies) to tens of MiB."""

_NARROW = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
)


_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
"""torch stores these, and can do little with them."""

SMALL = 0.7
"""The largest small change of a row, as a share of its norm."""

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
"""The first dimension of their weights counts rows. Classes that inherit from these may compute something else."""


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` → `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def dtype_max(dtype: torch.dtype) -> float:
    """Largest finite value of a floating dtype; infinity for others, which cannot overflow to Inf."""
    return torch.finfo(dtype).max if dtype.is_floating_point else math.inf


def measure(tensor: torch.Tensor, name: str) -> TensorStats:
    """Measure a dense tensor of any shape and dtype.

    Raises:
        CannotJudge: the tensor has no values to look at (meta device).
    """
    if tensor.is_meta:
        raise CannotJudge("tensor_without_values", name=name)
    values = _plain(tensor)
    stats = TensorStats(name=name, dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape), numel=tensor.numel())
    if values.numel() == 0:
        return stats
    low, high = (float(bound) for bound in torch.aminmax(values))
    if math.isfinite(low) and math.isfinite(high):
        return replace(stats, minimum=low, maximum=high)
    return _count(values, stats)


def joined(parts: Sequence[tuple[int, TensorStats]]) -> TensorStats:
    """The figures of a tensor, from those of its rows, in order, with the number of the first one of each part."""
    if len(parts) == 1:
        return parts[0][1]
    stats = [stats for _, stats in parts]
    lows = [one.minimum for one in stats if one.minimum is not None]
    highs = [one.maximum for one in stats if one.maximum is not None]
    places = ((start + one.first_index[0], *one.first_index[1:]) for start, one in parts if one.first_index)
    return replace(
        stats[0],
        shape=(sum(one.shape[0] for one in stats), *stats[0].shape[1:]),
        numel=sum(one.numel for one in stats),
        minimum=min(lows, default=None),
        maximum=max(highs, default=None),
        nan=sum(one.nan for one in stats),
        posinf=sum(one.posinf for one in stats),
        neginf=sum(one.neginf for one in stats),
        first_index=next(places, None),
    )


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in a form that `aminmax` takes: dense, real, not bool, not float8, not unsigned."""
    values = tensor.detach()
    if type(values) is not torch.Tensor:
        values = values.as_subclass(torch.Tensor)
    if values.layout is not torch.strided:
        values = values.to_dense()
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    if values.dtype in _NARROW:
        return values.to(torch.float32)
    if values.dtype in _UNSIGNED:
        return values.to(torch.float64)
    if values.dtype is torch.bool:
        return values.to(torch.uint8)
    return values


def _chunks(values: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    flat = values.reshape(-1)
    for start in range(0, flat.numel(), CHUNK_ELEMENTS):
        yield start, flat[start : start + CHUNK_ELEMENTS]


def _count(values: torch.Tensor, stats: TensorStats) -> TensorStats:
    """The slow pass: counts, extremes of the finite elements, index of the first that is not."""
    nan = posinf = neginf = 0
    low, high = math.inf, -math.inf
    first: int | None = None
    for start, chunk in _chunks(values):
        finite = torch.isfinite(chunk)
        bad = int(chunk.numel() - finite.sum())
        if bad:
            nan += int(torch.isnan(chunk).sum())
            posinf += int(torch.isposinf(chunk).sum())
            neginf += int(torch.isneginf(chunk).sum())
            if first is None:
                first = start + int(finite.to(torch.uint8).argmin())
        if bad < chunk.numel():
            chunk_low, chunk_high = torch.aminmax(chunk[finite] if bad else chunk)
            low, high = min(low, float(chunk_low)), max(high, float(chunk_high))
    return replace(
        stats,
        minimum=None if low > high else low,
        maximum=None if low > high else high,
        nan=nan,
        posinf=posinf,
        neginf=neginf,
        first_index=None if first is None else _unravel(first, tuple(values.shape)),
    )


def _unravel(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(shape):
        flat, position = divmod(flat, size)
        index.append(position)
    return tuple(reversed(index))


def shares_storage(known: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether a tensor is the base's own memory."""
    places = [(side.data_ptr(), side.shape, side.stride(), side.dtype) for side in (known, tensor)]
    return places[0] == places[1]


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two dense tensors hold the same bits (NaN equals NaN, 0.0 differs from −0.0)."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    both = [_bits(tensor).flatten() for tensor in (left, right)]
    per_word = 8 // both[0].element_size()
    if both[0].numel() and all(tensor.numel() % per_word == tensor.storage_offset() % per_word == 0 for tensor in both):
        both = [tensor.view(torch.int64) for tensor in both]  # fewer values to compare
    return torch.equal(*both)


def same_values(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two dense tensors hold the same values: 0.0 is −0.0, and NaN is NaN."""
    if left.shape != right.shape:
        return False
    if same_bits(left, right) or torch.equal(left, right):
        return True
    return all(
        bool(((a == b) | (a.isnan() & b.isnan())).all())
        for (_, a), (_, b) in zip(_chunks(left), _chunks(right), strict=True)
    )


def unchanged_fraction(left: torch.Tensor, right: torch.Tensor) -> float:
    """Share of the elements whose bits are the same in both tensors (same shape and dtype)."""
    if left.numel() == 0:
        return 1.0
    same = sum(int((a == b).sum()) for (_, a), (_, b) in zip(_chunks(_bits(left)), _chunks(_bits(right)), strict=True))
    return same / left.numel()


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    values = tensor.detach().as_subclass(torch.Tensor)
    if values.is_complex():
        values = torch.view_as_real(values)
    return values.contiguous().view(_INTEGERS[values.element_size()])


def row_norms(left: torch.Tensor, right: torch.Tensor | None = None) -> torch.Tensor:
    """The norm of each row (all values with one first index) of a weight, or of the difference of two.

    On the CPU in float64. NaN if squares leave float32.
    """
    rows = left.detach().flatten(1)
    parts: Iterable[torch.Tensor] = (rows,)
    if right is not None:
        most = max(1, CHUNK_ELEMENTS // max(1, rows.shape[1]))
        pairs = zip(torch.split(rows, most), torch.split(right.detach().flatten(1), most), strict=True)
        parts = (tensor.float() - other.float() for tensor, other in pairs)
    norms = torch.cat([torch.linalg.vector_norm(part, dim=1) for part in parts]).cpu().double()
    return norms.where(norms.isfinite(), torch.nan)


def distance(left: torch.Tensor, right: torch.Tensor | None = None) -> float:
    """‖left − right‖ (‖left‖ without `right`), Frobenius; float32 differences summed in float64, NaN if undefined."""
    total = 0.0
    other = _chunks(right) if right is not None else None
    for _, chunk in _chunks(left):
        wide = chunk.detach().to(torch.float32)
        if other is not None:
            wide = wide - next(other)[1].detach().to(torch.float32)
        total += float(torch.linalg.vector_norm(wide, dtype=torch.float64)) ** 2
    return math.nan if math.isnan(total) else math.sqrt(total)


def has_rows(module: nn.Module, tensor: torch.Tensor) -> bool:
    """Whether the first dimension of a module's tensor counts rows. A bias has one dimension."""
    return type(module) in PLAIN and tensor.dim() > 1


def is_small(change: torch.Tensor, was: torch.Tensor) -> bool:
    """Whether rows with these norms change by little: by these norms, or less. NaN is not small."""
    return bool((change <= SMALL * was).all())
