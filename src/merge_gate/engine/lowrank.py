"""The fast way of the common merge: vanilla LoRA on a linear layer, in blocks of rows that stay in cache.

In: a weight, the two factors of its delta, a scaling. Out: `LowRankMerge`, figures about the merged weight. Knows
torch and nothing else: no PEFT, no models, no files, no idea of what is good or bad. The weight is never written.

PEFT merges with whole tensors (peft/tuners/lora/layer.py, `Linear.merge` with `safe_merge=True`):

    1. product   B @ A                              float32, as large as the weight and twice as wide
    2. delta     (product * scaling).to(W.dtype)
    3. merged    W.clone() += delta
    4. check     torch.isfinite(merged).all()

Here the same four steps, in the same order and with the same roundings, run on a block of rows at a time, so that
only W itself travels from memory. Steps 2 to 4 work element by element: a block has the bits of the whole. Step 1 does
not: a matrix product may pick another kernel, and with it another order of additions, for another number of rows
(MKL does so for a last block of 1, 2, 3, 5, 6, 7 or 9 rows). Therefore a last block is never short, and each shape is
proved before it is used: blocks of a pseudo-random product are compared with the whole of it, once per shape and
process. Where they differ, and where one block holds the whole, step 1 is PEFT's own expression.

Where the question is only whether all of it is finite, a `merged_bound` answers for most adapters from the largest
|W|, |A| and |B|, and what is left to do is a sample of the rows: what rounding costs, and whether anything changes.

One call works on one core, if its thread says `torch.set_num_threads(1)`; parallel.py spreads modules over the cores.
Splitting every step over the cores instead, as torch does, makes them wait for each other six times per block.
"""

from __future__ import annotations

import functools
import math
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK_ELEMENTS = 1 << 18
"""Elements of a block: 1 MiB of float32 product and 0.5 MiB each of delta and merged weight, near a core's own L2."""

BLOCK_ROWS = 64
"""Rows of a block come in multiples of this, so that every block of a factor starts on a cache line."""

SAMPLE_ROWS = 64
SAMPLE_ELEMENTS = 1 << 17
"""At least so many rows, and about so many elements, are merged of a weight that a bound settles."""

PROOF_ELEMENTS = 1 << 17
"""A proof compares at least so many elements: at rank 2 another order of additions changes only some of them."""

ALIGNMENT_BYTES = 64
"""Where torch's allocator puts a tensor. MKL's bits depend on it for some narrow shapes."""

_ONE_PROOF_AT_A_TIME = threading.Lock()
"""A proof holds a whole product: one of them at a time, and no shape proved twice."""

MOST_RANK = 1 << 16
"""Up to this rank the roundings of a float32 sum are negligible in a `merged_bound`."""

ROUNDINGS = 2.0
"""What all roundings of a merge may add to a value, as a factor; they add 2 % at most."""

_ACCUMULATED = (torch.float32, torch.float64)
"""Dtypes of factors whose product is summed in the same dtype on every device."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What rounding does to a merge. The sums are NaN or infinite where their summands are not finite.

    `unchanged` elements of `numel` kept their value. `delta_sq` is ‖delta‖² before it was rounded to the weight's
    dtype, `lost_sq` is ‖merged - (W + delta)‖², `base_sq` is ‖W‖².
    """

    numel: int
    unchanged: int
    delta_sq: float
    lost_sq: float
    base_sq: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankMerge:
    """What a merged weight is like, in the weight's own dtype.

    Of the `numel` elements, `merged` were merged, and all that follows is of these: `minimum` and `maximum`, NaN as
    soon as one of them is NaN; whether any has `changed` its value (-0.0 and 0.0 are the same value); and, unless they
    were not asked for, the `figures`.
    """

    numel: int
    merged: int
    minimum: float
    maximum: float
    changed: bool
    figures: Figures | None

    @property
    def finite(self) -> bool:
        return math.isfinite(self.minimum) and math.isfinite(self.maximum)

    @property
    def max_abs(self) -> float:
        """NaN where the merge is."""
        return max(-self.minimum, self.maximum)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """Extremes of a tensor (NaN if it holds NaN, None if it is empty) and its sum of squares where asked for."""

    numel: int
    minimum: float | None
    maximum: float | None
    sum_sq: float | None = None

    @property
    def finite(self) -> bool:
        return all(bound is None or math.isfinite(bound) for bound in (self.minimum, self.maximum))


class Scratch:
    """Buffers that live from block to block and from module to module. Each thread needs its own.

    It grows to the largest block it met, about 3 MiB for a weight in bfloat16.
    """

    def __init__(self, *, block_elements: int = BLOCK_ELEMENTS) -> None:
        self.block_elements = block_elements
        self._buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def take(self, name: str, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor of `like`'s shape and device, valid until the next call with this name."""
        key = (name, dtype, like.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < like.numel():
            buffer = self._buffers[key] = torch.empty(like.numel(), dtype=dtype, device=like.device)
        return buffer[: like.numel()].view(like.shape)

    def blocks(self, rows: int, columns: int, device: torch.device) -> tuple[slice, ...]:
        """Slices of about `block_elements`; the last one takes what would be a short block. One slice off the CPU."""
        step = max(self.block_elements // columns // BLOCK_ROWS, 1) * BLOCK_ROWS
        count = max(rows // step, 1) if device.type == "cpu" else 1
        return tuple(slice(i * step, rows if i == count - 1 else (i + 1) * step) for i in range(count))


@dataclass(frozen=True, slots=True)
class _Factors:
    """The factors in the order in which the weight stores its rows: weight.shape == (left @ right).shape.

    `transposed` for weights stored as (in, out), transformers' Conv1D: PEFT takes the transpose of B @ A, the blocks
    come from Aᵀ @ Bᵀ. `rounded_to` is the dtype of half-precision factors, to which PEFT rounds the scaled product.
    """

    left: torch.Tensor
    right: torch.Tensor
    transposed: bool
    rounded_to: torch.dtype | None

    @classmethod
    def of(cls, lora_a: torch.Tensor, lora_b: torch.Tensor, *, transposed: bool) -> _Factors:
        a, b, rounded_to = _aligned(lora_a.detach()), _aligned(lora_b.detach()), None
        if b.device.type == "cpu" and b.dtype in _HALVES:
            a, b, rounded_to = a.float(), b.float(), b.dtype
        return cls(a.T, b.T, transposed, rounded_to) if transposed else cls(b, a, transposed, rounded_to)

    def whole(self) -> torch.Tensor:
        """PEFT's own expression."""
        return (self.right.T @ self.left.T).T if self.transposed else self.left @ self.right

    def divisible(self, blocks: tuple[slice, ...]) -> bool:
        """Whether the product may be made in these blocks of rows: there are several, and they keep the bits."""
        if len(blocks) == 1:
            return False
        with _ONE_PROOF_AT_A_TIME:
            return _proved(
                rows=self.left.shape[0],
                columns=self.right.shape[1],
                rank=self.left.shape[1],
                dtype=self.left.dtype,
                transposed=self.transposed,
                starts=tuple(block.start for block in blocks),
                threads=torch.get_num_threads(),
            )

    def block(self, rows: slice, scratch: Scratch, like: torch.Tensor) -> torch.Tensor:
        return torch.mm(self.left[rows], self.right, out=scratch.take("product", like, self.left.dtype))

    def rounded(self, product: torch.Tensor, scratch: Scratch) -> torch.Tensor:
        """The scaled product as PEFT returns it from `get_delta_weight`."""
        if self.rounded_to is None:
            return product
        return scratch.take("rounded", product, self.rounded_to).copy_(product)


@functools.cache
def _proved(
    *, rows: int, columns: int, rank: int, dtype: torch.dtype, transposed: bool, starts: tuple[int, ...], threads: int
) -> bool:
    """Whether row blocks of a product of these shapes have the bits of the whole product: a fact of this machine."""
    del threads  # part of the fact, as the bits could depend on it
    generator = torch.Generator().manual_seed(0)
    blocks = [slice(*ends) for ends in zip(starts, (*starts[1:], None), strict=True)]
    left_out, right_in = (columns, rows) if transposed else (rows, columns)
    for _ in range(PROOF_ELEMENTS // (rows * columns) + 1):
        lora_a = torch.randn(rank, right_in, generator=generator, dtype=dtype)
        lora_b = torch.randn(left_out, rank, generator=generator, dtype=dtype)
        factors = _Factors.of(lora_a, lora_b, transposed=transposed)
        whole = factors.whole()
        if not all(torch.equal(torch.mm(factors.left[block], factors.right), whole[block]) for block in blocks):
            return False
    return True


def supports(weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, *, fan_in_fan_out: bool = False) -> bool:
    """Whether `merge_measured` can take these: plain dense floats whose shapes fit.

    The factors must be on one device; the weight may still be on its way there. What it refuses (quantised or sparse
    weights, factors of two dtypes, empty tensors) is for PEFT's own code.
    """
    tensors = (weight, lora_a, lora_b)
    plain = all(
        type(t) in (torch.Tensor, torch.nn.Parameter)
        and t.layout is torch.strided
        and t.dtype in _FLOATS
        and t.dim() == 2  # noqa: PLR2004
        and t.numel() > 0
        and not t.is_meta
        for t in tensors
    )
    alike = lora_a.dtype == lora_b.dtype and lora_a.device == lora_b.device
    if not plain or not alike or lora_a.shape[0] != lora_b.shape[1]:
        return False
    delta_shape = (lora_b.shape[0], lora_a.shape[1])
    return tuple(weight.shape) == (delta_shape[::-1] if fan_in_fan_out else delta_shape)


@torch.no_grad()
def merged_bound(
    weight_max: float, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float, dtype: torch.dtype
) -> float:
    """A number that no |W + scaling · B @ A| exceeds, whoever computes it; infinite where some step could overflow.

    An element of B @ A is a sum of r products, so that it and each of its partial sums, in any order, is at most
    r · max|B| · max|A|. A rounding adds a share of 2⁻⁸ (bfloat16) or less: r + 3 of them, all but three in the factors'
    dtype, stay far below the factor `ROUNDINGS`; among denormals it adds less than the least normal number. Whatever is
    held on the way has to fit its dtype, the scaling too. "Whoever" holds the factors in float32 or float64, as PEFT
    does by default, on any device and with any kernel.

    Args:
        weight_max: max|W|, of a W that is finite.
        lora_a: (r, in), float32 or float64.
        lora_b: (out, r), of the same dtype.
        scaling: PEFT's `scaling[adapter]`.
        dtype: of W, to which the delta is rounded and in which it is added.
    """
    rank = lora_a.shape[0]
    if lora_a.dtype not in _ACCUMULATED or rank > MOST_RANK:
        return math.inf
    low_a, high_a, low_b, high_b = torch.stack((*torch.aminmax(lora_a), *torch.aminmax(lora_b))).tolist()
    product = rank * max(-low_a, high_a) * max(-low_b, high_b)
    delta = product * abs(scaling)
    merged = weight_max + delta
    own = lora_a.dtype
    held = ((abs(scaling), own), (product, own), (delta, own), (delta, dtype), (merged, dtype))
    fits = all(ROUNDINGS * size < torch.finfo(where).max for size, where in held)  # false of NaN
    return ROUNDINGS * merged + torch.finfo(dtype).tiny if fits else math.inf


@torch.no_grad()
def merge_measured(
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    *,
    scratch: Scratch,
    fan_in_fan_out: bool = False,
    figures: bool = True,
    emit: Callable[[int, torch.Tensor], None] | None = None,
) -> LowRankMerge:
    """Measure W + scaling · B @ A as PEFT's `safe_merge=True` would leave it, without ever holding it.

    Args:
        weight: (out, in), or (in, out) with `fan_in_fan_out`; float32, bfloat16, float16 or float64. Only read.
        lora_a: (r, in), as PEFT holds it after loading (float32 by default).
        lora_b: (out, r), of the same dtype.
        scaling: PEFT's `scaling[adapter]`.
        scratch: The calling thread's buffers; pass the same one for all modules.
        fan_in_fan_out: The weight is stored transposed (transformers' Conv1D).
        figures: Take them, which costs more than the merge.
        emit: Is given every merged block with the index of its first row; the block is overwritten afterwards.

    Raises:
        ValueError: `supports` is false of these tensors.
    """
    factors = _factors(weight, lora_a, lora_b, fan_in_fan_out=fan_in_fan_out)
    base = weight.detach()
    blocks = scratch.blocks(base.shape[0], base.shape[1], base.device)
    whole = None if factors.divisible(blocks) else factors.whole()
    tally = _Tally(take_figures=figures)
    for rows in blocks:
        block = base[rows]
        product = factors.block(rows, scratch, block) if whole is None else whole[rows]
        merged = tally.merge(block, product, factors, scaling, scratch)
        if emit is not None:
            emit(rows.start, merged)
    return tally.result(base.numel())


@torch.no_grad()
def merge_sample(
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    *,
    scratch: Scratch,
    fan_in_fan_out: bool = False,
    sample_elements: int = SAMPLE_ELEMENTS,
) -> LowRankMerge:
    """As `merge_measured`, of rows spread evenly over the weight: about `sample_elements`, and at least `SAMPLE_ROWS`.

    For a weight whose `merged_bound` says enough about its values. The weight may be in host memory while the factors
    are on a card: only the sample travels. Its products are not proved to have the bits of the whole product; they may
    differ in the last bit of float32, as from one device to another.
    """
    rows, columns = weight.shape
    step = max(rows // max(SAMPLE_ROWS, sample_elements // columns), 1)
    step -= 1 - step % 2 if step > 1 else 0  # odd: an even one would meet the same place of every attention head
    sample = weight.detach()[::step].to(lora_a.device)
    sides = (lora_a[:, ::step], lora_b) if fan_in_fan_out else (lora_a, lora_b[::step])
    factors = _factors(sample, *sides, fan_in_fan_out=fan_in_fan_out)
    tally = _Tally(take_figures=True)
    tally.merge(sample, factors.block(slice(None), scratch, sample), factors, scaling, scratch)
    return tally.result(weight.numel())


def _factors(weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, *, fan_in_fan_out: bool) -> _Factors:
    if weight.device != lora_a.device or not supports(weight, lora_a, lora_b, fan_in_fan_out=fan_in_fan_out):
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (weight, lora_a, lora_b))
        raise ValueError(f"not a vanilla LoRA on a dense linear weight: got weight, lora_A, lora_B of {shapes}")
    return _Factors.of(lora_a, lora_b, transposed=fan_in_fan_out)


def delta_norm_sq(lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> float:
    """‖scaling · B @ A‖², Frobenius, in float64, from r-by-r matrices only: tr((BᵀB)(AAᵀ)) · scaling²."""
    a, b = lora_a.detach().double(), lora_b.detach().double()
    return max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0) * scaling**2


@torch.no_grad()
def extent(tensor: torch.Tensor, *, scratch: Scratch, sum_sq: bool = False) -> Extent:
    """Extremes of a dense real tensor of any shape, in one pass over memory, and its sum of squares if asked for."""
    values = tensor.detach().reshape(-1)
    if values.numel() == 0:
        return Extent(numel=0, minimum=None, maximum=None, sum_sq=0.0 if sum_sq else None)
    if not sum_sq:
        low, high = torch.stack(torch.aminmax(values)).tolist()
        return Extent(numel=values.numel(), minimum=low, maximum=high)
    bounds: list[tuple[torch.Tensor, torch.Tensor]] = []
    total = torch.zeros((), dtype=torch.float64, device=values.device)
    for chunk in torch.split(values, scratch.block_elements):
        bounds.append(torch.aminmax(chunk))
        total += _sum_sq(chunk)
    low, high = _reduced(bounds)
    return Extent(numel=values.numel(), minimum=low, maximum=high, sum_sq=float(total))


@dataclass(slots=True)
class _Tally:
    """Figures gathered block by block. They stay on the device until `result`."""

    take_figures: bool
    bounds: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    sums: list[torch.Tensor] = field(default_factory=list)
    merged: int = 0
    changed: bool = False

    def merge(
        self,
        base: torch.Tensor,
        product: torch.Tensor,
        factors: _Factors,
        scaling: float,
        scratch: Scratch,
    ) -> torch.Tensor:
        """Steps 2 to 4 of one block of rows: merge it, count it, return it. The product is scaled in place."""
        exact = factors.rounded(product.mul_(scaling), scratch)
        delta = exact if exact.dtype == base.dtype else scratch.take("delta", exact, base.dtype).copy_(exact)
        merged = torch.add(base, delta, out=scratch.take("merged", base, base.dtype))
        self.bounds.append(torch.aminmax(merged))
        self.merged += merged.numel()
        if self.take_figures:
            wide = torch.float32 if base.dtype in _HALVES else torch.float64
            moved = scratch.take("wide", merged, wide).copy_(merged).sub_(base)
            moves = torch.count_nonzero(moved).double()
            self.sums.append(torch.stack((moves, _sum_sq(exact), _sum_sq(moved.sub_(exact)), _sum_sq(base))))
        elif not self.changed:
            self.changed = not torch.equal(base, merged)
        return merged

    def result(self, numel: int) -> LowRankMerge:
        low, high = _reduced(self.bounds)
        figures, changed = None, self.changed
        if self.take_figures:
            moves, delta_sq, lost_sq, base_sq = torch.stack(self.sums).sum(0).tolist()
            unchanged, changed = self.merged - int(moves), moves > 0
            figures = Figures(
                numel=self.merged, unchanged=unchanged, delta_sq=delta_sq, lost_sq=lost_sq, base_sq=base_sq
            )
        return LowRankMerge(
            numel=numel, merged=self.merged, minimum=low, maximum=high, changed=changed, figures=figures
        )


def _reduced(bounds: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, float]:
    """The least and the greatest of (low, high) pairs; NaN where one is NaN."""
    lows, highs = zip(*bounds, strict=True)
    return torch.stack(lows).min().item(), torch.stack(highs).max().item()


def _sum_sq(values: torch.Tensor) -> torch.Tensor:
    """Σx², in float64 throughout: squares of float32 and bfloat16 values leave the range of float32."""
    wide = values if values.dtype.is_floating_point else values.double()
    norm: torch.Tensor = torch.linalg.vector_norm(wide, dtype=torch.float64)
    return norm.square()


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, row-major and where torch's allocator would have put it."""
    dense = tensor.contiguous()
    return dense if dense.data_ptr() % ALIGNMENT_BYTES == 0 else dense.clone()
