"""The merge in float64, how far a merge in float32 may be from it, and how the values of a tensor deviate.

In: an adapter to merge, and names of the base's tensors; or actual, expected, and base values. Out:
`ExactRows`, `Deviation`, and `Fit`: units of the last place and least squares. Judges nothing.

The bounds of a float32 merge, with u = 2⁻²⁴ and γ_n = n·u/(1 − n·u):

1. LoRA adds D = s·BA with r ranks. Each product, sum, and scaling rounds once, so |D̂ − D| ≤ γ_(r+4)·|s|·|B||A| in every
   order. These errors are nearly independent. A partial sum is about √(D² + s²·B²A²), so the standard deviation of
   D̂ − D is at most u·√((r+4)/3)·√(D² + s²·B²A²). The bound is the smaller of γ and `DEVIATIONS` of these. A row or a
   column shares the rounding of a factor that was scaled: at most u·|s|·|B||A|, with a deviation of u/√3·|s|·√(B²A²).
2. Other methods are merged by PEFT in float64. Their bound is `OTHER_METHODS` of the tensor's largest value.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from merge_gate.engine.adapter_evidence import MergeRequest, planned
from merge_gate.engine.blocks.delta import LowRankUpdate
from merge_gate.engine.merge.adapter_merge import AdapterMerge
from merge_gate.engine.merge.private_copies import MergeTarget, private_copies, targets_of
from merge_gate.engine.tensors.measure import CHUNK_ELEMENTS
from merge_gate.features.verify.comparison import Deviation

BLOCK = 64
"""Values that share a scale in 4 bits, as transformers loads a base."""

LEAST_EXPLAINED = 0.5
"""A quantization explains a difference if it explains at least half of it: its scales may be quantized too."""

_EXPONENTS = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}
"""The integers of the size of a floating dtype, and the bits of the exponent in them."""

_HALVES = (torch.bfloat16, torch.float16)

FLOAT32 = 2.0**-24
"""The largest relative error of one operation in float32."""

LOOSE = 2.0**-6
"""Factors in 16 bits change a product by less than this share of what is added up to make it."""


def deviation(actual: torch.Tensor, expected: torch.Tensor, base: torch.Tensor) -> Deviation:
    """Compare three tensors of one shape."""
    result = Deviation()
    if actual.dtype not in _EXPONENTS or expected.dtype not in _EXPONENTS:
        return result
    coarse = max((actual.dtype, expected.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    wide = torch.float64 if {torch.float32, torch.float64} & {actual.dtype, expected.dtype} else torch.float32
    flat = [tensor.detach().reshape(-1) for tensor in (actual, expected, base)]
    for start in range(0, actual.numel(), CHUNK_ELEMENTS):
        result = _added(result, coarse, *(tensor[start : start + CHUNK_ELEMENTS].to(wide) for tensor in flat))
    return result


def _added(
    before: Deviation, dtype: torch.dtype, actual: torch.Tensor, expected: torch.Tensor, base: torch.Tensor
) -> Deviation:
    is_finite = torch.isfinite(actual)
    comparable = is_finite & torch.isfinite(expected) & torch.isfinite(base)
    nonfinite = int((~is_finite & torch.isfinite(expected)).sum())
    largest = math.inf if bool((is_finite & ~torch.isfinite(expected)).any()) else before.units
    if not bool(comparable.all()):
        actual, expected, base = (torch.where(comparable, tensor, 0.0) for tensor in (actual, expected, base))
    unit = units(torch.maximum(base.abs(), expected.abs()), dtype)
    delta, moved = (expected - base).double(), (actual - base).double()
    return Deviation(
        units=max(largest, float(((actual - expected).abs() / unit).max())) if len(unit) else largest,
        delta_sq=before.delta_sq + float(delta.dot(delta)),
        cross=before.cross + float(delta.dot(moved)),
        actual_sq=before.actual_sq + float(moved.dot(moved)),
        rounding_sq=before.rounding_sq + float(torch.linalg.vector_norm(unit, dtype=torch.float64)) ** 2,
        nonfinite=before.nonfinite + nonfinite,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactRows:
    """Rows of a merged tensor from row `start` on, in float64.

    `base` is W, `merged` is the merge without any rounding, and `bound` is how far a float32 merge may be from it.
    A row or a column may share an error of `shared`.
    `size` is the magnitude of what is added up to make the delta: |s|·|B||A|, or the tensor's largest value.
    """

    name: str
    start: int
    base: torch.Tensor
    merged: torch.Tensor
    bound: torch.Tensor
    shared: torch.Tensor
    size: torch.Tensor


class Fit:
    """How well orders of rounding explain the values of one tensor. Rows are added from the first to the last.

    A float32 merge gives some number within `bound` of the exact W + D. It is then rounded in one order, the same for
    the whole tensor. F is the final dtype of the merge or the dtype of the actual values, and fl rounds to it:

    - once: fl(fl(W) + D). If F has 16 bits, the sum is rounded in float32 first.
    - twice: fl(fl(W) + fl(D)), if F has 16 bits.

    Each order is monotone, so it explains a value that lies between its results at both ends of the bound. The errors
    of an honest merge have random signs, except for what a row or a column may share: a rounded factor, and the
    scaling, which is rounded at most twice.

    Args:
        dtype: that of the merge.
        factor: the k of W + kD that values which no order explains may still be near.
    """

    def __init__(self, dtype: torch.dtype, actual: torch.dtype, factor: float) -> None:
        finals = dict.fromkeys((dtype, actual))
        self._orders = [
            _Order(final, is_twice) for final in finals for is_twice in (False, True)[: 1 + (final in _HALVES)]
        ]
        self._factor, self._coarse = factor, max(finals, key=lambda final: torch.finfo(final).eps)
        self.astray = 0

    def add(self, actual: torch.Tensor, rows: ExactRows) -> None:
        """Add rows."""
        values, delta = actual.detach().double(), rows.merged - rows.base
        is_comparable = torch.isfinite(values) & torch.isfinite(rows.merged)
        for order in self._orders:
            order.add(values, is_comparable, rows, actual.dtype)
        room = LOOSE * max(1.0, abs(self._factor)) * rows.size
        room = room + 2 * units(torch.maximum(rows.base.abs(), values.abs()), self._coarse)
        self.astray += int((is_comparable & ((values - rows.base - self._factor * delta).abs() > room)).sum())

    def best(self) -> tuple[int, float]:
        """How many values the best order does not explain, and its largest sum of signs in standard deviations."""
        return min((order.outside, order.bias()) for order in self._orders)


@dataclass(slots=True)
class _Order:
    """One order of rounding. It sums up each row and column: steps, their squares, and what they may share."""

    final: torch.dtype
    is_twice: bool
    outside: int = 0
    _rows: list[torch.Tensor] = field(default_factory=list)
    _columns: torch.Tensor | None = None

    def add(self, values: torch.Tensor, comparable: torch.Tensor, rows: ExactRows, actual: torch.dtype) -> None:
        start, delta, bound = rows.base.to(self.final).double(), rows.merged - rows.base, rows.bound
        if self.final in _HALVES and not self.is_twice:
            bound = bound + FLOAT32 * ((start + delta).abs() + bound)
        low, centre, high = (self._rounded(start, delta + offset, actual) for offset in (-bound, 0.0, bound))
        self.outside += int((comparable & ((values < low) | (values > high))).sum())
        unit = units(centre.abs(), self.final) + bound
        counted = comparable & torch.isfinite(centre)
        step, drift = values - centre, 2 * FLOAT32 * delta
        parts = torch.stack((step, step, drift, rows.shared.expand_as(delta))) / unit
        parts = torch.where(counted, parts, 0.0).reshape(4, len(delta) if delta.dim() > 1 else 1, -1)
        parts[1].square_()
        self._rows.append(parts.sum(2))
        columns = parts.sum(1)
        self._columns = columns if self._columns is None else self._columns + columns

    def _rounded(self, start: torch.Tensor, delta: torch.Tensor, actual: torch.dtype) -> torch.Tensor:
        if self.is_twice:
            delta = delta.to(self.final).double()
        return (start + delta).to(self.final).to(actual).double()

    def bias(self) -> float:
        if self._columns is None:
            return 0.0
        sums = torch.cat((*self._rows, self._columns, self._columns.sum(1, keepdim=True)), 1)
        steps, squares, drift, shared = sums[:, sums[1] > 0]
        return float(((steps.abs() - drift.abs() - shared) / squares.sqrt()).max()) if len(steps) else 0.0


def units(magnitude: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The unit of the last place of each of these values in a floating dtype."""
    info = torch.finfo(dtype)
    bits, exponent = _EXPONENTS[dtype]
    power = (magnitude.to(dtype).view(bits) & exponent).view(dtype)  # without the mantissa: a power of two
    unit = power.to(magnitude.dtype) * info.eps
    return unit.clamp(min=max(info.smallest_normal * info.eps, torch.finfo(magnitude.dtype).tiny))


def requantized(actual: torch.Tensor, expected: torch.Tensor, base: torch.Tensor) -> tuple[str, float] | None:
    """The quantization of the base that explains `actual - expected` best, and the share that it explains.

    None if none explains enough, if the tensor is no matrix, or if bitsandbytes is absent.
    """
    if base.dim() != 2 or base.numel() % BLOCK or not base.is_floating_point():  # noqa: PLR2004 - a matrix
        return None
    try:
        from bitsandbytes import functional  # noqa: PLC0415 - only for a difference without another explanation
    except ImportError:
        return None
    wide = base.detach().to(torch.float32)
    difference = actual.detach().to(torch.float32) - expected.detach().to(torch.float32)
    whole = float(difference.double().square().sum())
    scale = wide.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    quantizations = {"bnb-8bit": (wide / scale).round() * scale}
    for kind in ("nf4", "fp4"):
        packed, state = functional.quantize_4bit(wide, blocksize=BLOCK, quant_type=kind)
        quantizations[f"bnb-4bit {kind}"] = functional.dequantize_4bit(packed, state).to(torch.float32)
    rests = {
        kind: float((difference - (quantized - wide)).double().square().sum())
        for kind, quantized in quantizations.items()
    }
    best = min(rests, key=rests.__getitem__)
    share = 1 - rests[best] / whole if whole else 0.0
    return (best, share) if share >= LEAST_EXPLAINED else None


DEVIATIONS = 6.0
"""One in 500 million values is further off than so many standard deviations."""

OTHER_METHODS = 2.0**-18

ELEMENTS = 1 << 16
"""Elements that are compared at a time: they stay in the processor's cache."""


@torch.no_grad()
def exact_merge(request: MergeRequest, names: Collection[str]) -> Iterator[ExactRows]:
    """The exact merges of these tensors, of an adapter that was merged. A tensor that PEFT only copies has none.

    A tensor that several layers change comes once for each, and none of these is the whole merge. Between two of its
    values, a generator keeps no state that other code shares, so the decorator of torch is used.
    """
    merge = planned(request)
    givers: dict[str, set[int]] = {}  # an outer layer may merge the tensors of its inner layers
    in_blocks = {id(block.layer): block for block in merge.planned if block.update.magnitude is None}
    for _, layer in merge.layers:
        targets = targets_of(layer, merge.loaded.base_names)
        wanted = [target for target in targets if target.name in names and id(layer) not in givers.get(target.name, ())]
        block = in_blocks.get(id(layer))
        if wanted and block is not None:
            with merge.base.filled([block.target.name]):
                yield from lora_rows(block.target.name, block.target.data, block.update)
        elif wanted:
            for rows in _by_peft(merge, layer, targets, wanted):
                givers[rows.name] = {id(inner) for inner in layer.modules() if inner is not layer}
                yield rows


def lora_rows(name: str, weight: torch.Tensor, update: LowRankUpdate) -> Iterator[ExactRows]:
    """Case 1, for a weight of any dtype."""
    ranks = update.lora_a.shape[0]
    a, b = update.lora_a.double(), update.lora_b.double() * update.scaling
    left, right = (a.T, b.T) if update.transposed else (b, a)
    largest = FLOAT32 * (ranks + 4) / (1 - FLOAT32 * (ranks + 4))
    step = max(1, ELEMENTS // weight.shape[1])
    for start in range(0, len(weight), step):
        base, part = weight[start : start + step].double(), left[start : start + step]
        delta, size, square = part @ right, part.abs() @ right.abs(), part.square() @ right.square()
        deviation = FLOAT32 / math.sqrt(3) * square.sqrt()
        bound = DEVIATIONS * FLOAT32 * math.sqrt((ranks + 4) / 3) * (delta.square() + square).sqrt()
        yield ExactRows(
            name=name,
            start=start,
            base=base,
            merged=base + delta,
            bound=torch.minimum(largest * size, bound),
            shared=torch.minimum(FLOAT32 * size, DEVIATIONS * deviation),
            size=size,
        )


def _by_peft(
    merge: AdapterMerge, layer: Any, targets: list[MergeTarget], wanted: list[MergeTarget]
) -> Iterator[ExactRows]:
    """Case 2. Nothing if PEFT cannot merge the method in float64."""
    before, bases, merged = layer.get_base_layer(), {}, {}
    with (
        private_copies(layer, targets, merge.base, dtype=torch.float64, mapped=merge.loaded.mapped),
        _in_float64(layer),
    ):
        bases = {target.name: target.data.double() for target in wanted}
        try:
            layer.merge(safe_merge=False)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:
            return
        if layer.get_base_layer() is before:  # else PEFT has put a trained copy in its place
            merged = {target.name: target.tensor.data.double() for target in wanted if target.tensor is not None}
    for name, exact in merged.items():
        base = bases[name]
        if base.shape == exact.shape and exact.dim() and exact.numel() and not torch.equal(base, exact):
            size = torch.maximum(base.abs().max(), exact.abs().max())
            step = max(1, ELEMENTS * len(exact) // exact.numel()) if exact.dim() > 1 else len(exact)
            for start in range(0, len(exact), step):
                rows = slice(start, start + step)
                yield ExactRows(
                    name=name,
                    start=start,
                    base=base[rows],
                    merged=exact[rows],
                    bound=OTHER_METHODS * size,
                    shared=OTHER_METHODS / 2 * size,
                    size=size,
                )


@contextlib.contextmanager
def _in_float64(layer: Any) -> Iterator[None]:
    """Inside of the `with` block, the adapter's own tensors in a layer are float64."""
    of_base = {id(tensor) for tensor in layer.get_base_layer().parameters()}
    tensors = (*layer.parameters(), *layer.buffers())
    own = [tensor for tensor in tensors if id(tensor) not in of_base and tensor.is_floating_point()]
    stored = [tensor.data for tensor in own]
    for tensor in own:
        tensor.data = tensor.data.double()
    try:
        yield
    finally:
        for tensor, data in zip(own, stored, strict=True):
            tensor.data = data
