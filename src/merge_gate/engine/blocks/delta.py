"""A low-rank update, and its delta in blocks of rows that stay in cache, with the bits of PEFT's whole product.

In: the two factors of an update as PEFT holds them after loading. Out: blocks of `scaling · B @ A`. Knows torch and
nothing else: no PEFT, no models, no files, and no weight.

PEFT multiplies whole tensors (peft/tuners/lora/layer.py, `get_delta_weight`): a float32 product of the weight's shape,
then a scaled copy of it. Here both are made a block of rows at a time.

1. Scaling works element by element, so a block has the bits of the whole.
2. A matrix product may use another kernel for another number of rows, and then adds in another order. MKL does so for a
   last block of 1, 2, 3, 5, 6, 7 or 9 rows, so a last block is never short.
3. Each shape is proved before it is used: blocks of a pseudo-random product are compared with the whole product, once
   per shape and process. If they differ, or if one block holds the whole, PEFT's own expression makes the product.
"""

from __future__ import annotations

import functools
import math
import threading
from dataclasses import dataclass, replace

import torch

from merge_gate.engine.tensors.threads import Buffers

PROOF_ELEMENTS = 1 << 17
"""Least number of elements that a proof compares: at rank 2 another order of additions changes only some of them."""

ALIGNMENT_BYTES = 64
"""The alignment of tensors from torch's allocator. MKL's bits depend on it for some narrow shapes."""

ONE_PROOF_AT_A_TIME = threading.Lock()
"""A proof holds a whole product in memory, so one runs at a time. The lock also keeps a shape from two proofs."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowRankUpdate:
    """What a LoRA or DoRA adapter does to one weight.

    LoRA adds `scaling · lora_b @ lora_a` to it, (out, r) by (r, in). DoRA then gives each of the `out` rows of the sum
    the length in `magnitude`. `transposed`: the weight is stored as (in, out), as in transformers' Conv1D and in
    embeddings, whose rows are PEFT's `in`. The tensors are PEFT's, as it holds them after loading.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float
    transposed: bool = False
    magnitude: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight as it is stored."""
        rows, columns = self.lora_b.shape[0], self.lora_a.shape[1]
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def well_formed(self) -> bool:
        """Whether the factors are plain dense floats of one dtype and device, and fit each other."""
        a, b, m = self.lora_a, self.lora_b, self.magnitude
        if not (is_plain(a) and is_plain(b)) or a.dim() != 2 or b.dim() != 2:  # noqa: PLR2004
            return False
        alike = a.dtype == b.dtype and a.device == b.device and a.shape[0] == b.shape[1]
        return alike and (m is None or (is_plain(m) and m.shape == b.shape[:1] and m.device == b.device))

    def to(self, device: torch.device) -> LowRankUpdate:
        """The same update on another device."""
        magnitude = None if self.magnitude is None else self.magnitude.to(device)
        return replace(self, lora_a=self.lora_a.to(device), lora_b=self.lora_b.to(device), magnitude=magnitude)

    def aligned(self) -> LowRankUpdate:
        """The same update, with aligned copies of tensors that come from the file."""
        magnitude = None if self.magnitude is None else _aligned(self.magnitude)
        return replace(self, lora_a=_aligned(self.lora_a), lora_b=_aligned(self.lora_b), magnitude=magnitude)

    def sampled(self, step: int) -> LowRankUpdate:
        """The update of every `step`-th row of the stored weight."""
        a, b = (self.lora_a[:, ::step], self.lora_b) if self.transposed else (self.lora_a, self.lora_b[::step])
        m = self.magnitude if self.transposed or self.magnitude is None else self.magnitude[::step]
        return LowRankUpdate(lora_a=a, lora_b=b, scaling=self.scaling, transposed=self.transposed, magnitude=m)

    @torch.no_grad()
    def delta_norms(self) -> tuple[float, torch.Tensor]:
        """‖scaling · B @ A‖, Frobenius, and at least that of each row as it is stored: |scaling| · √(b (AAᵀ) bᵀ).

        In float64. DoRA's magnitude does not count. Infinite if the norm is too large for a float. Zero if B @ A
        cancels, as for an adapter that is combined with itself, with weights 1 and -1: a merge finds only rounding
        then. That rounding is a share of Σ ‖b_k‖ ‖a_k‖ over the ranks k.
        """
        a, b = self.lora_a.detach().double(), self.lora_b.detach().double()
        vectors, others = (a.T, b.T) if self.transposed else (b, a)
        gram = others @ others.T
        squares, sizes = (vectors @ gram).mul_(vectors).sum(1), vectors.square().sum(0)
        lost = sum(others.shape) * torch.finfo(gram.dtype).eps * sizes.sum() * gram.trace()  # more than sums can lose
        rows = (squares.clamp(min=0.0) + lost).sqrt_().mul_(abs(self.scaling))
        square, parts = float(squares.sum()), float((sizes * gram.diagonal()).sqrt().sum()) ** 2
        rounding = min(torch.finfo(dtype).eps for dtype in (torch.float32, self.lora_a.dtype)) / 2
        if math.isfinite(parts) and square <= rounding**2 * parts:
            return 0.0, rows
        return math.sqrt(max(square, 0.0)) * abs(self.scaling), rows


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether this is a dense tensor of floats that has values."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.dtype in FLOATS
        and tensor.numel() > 0
        and not tensor.is_meta
    )


class Delta:
    """The delta of an update, a block of rows of the stored weight at a time."""

    def __init__(self, update: LowRankUpdate, blocks: tuple[slice, ...], buffers: Buffers) -> None:
        self._factors = Factors.of(update.lora_a, update.lora_b, transposed=update.transposed)
        self._scaling, self._buffers = update.scaling, buffers
        is_proved = self._factors.proved(blocks)
        self._whole = None if is_proved else self._factors.whole().mul_(update.scaling)

    def block(self, rows: slice) -> torch.Tensor:
        """These rows of PEFT's `get_delta_weight`. The next call overwrites them."""
        delta = self._made(rows) if self._whole is None else self._whole[rows]
        if self._factors.rounded_to is None:
            return delta
        return self._buffers.take("rounded", delta, self._factors.rounded_to).copy_(delta)

    def _made(self, rows: slice) -> torch.Tensor:
        left, right = self._factors.left[rows], self._factors.right
        out = self._buffers.of_shape("delta", (left.shape[0], right.shape[1]), left.dtype, left.device)
        return multiplied(left, right, out).mul_(self._scaling)


def multiplied(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write left @ right to `out`."""
    return torch.mm(left, right, out=out)


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors in the order in which the weight stores its rows: weight.shape == (left @ right).shape.

    `transposed` is for weights stored as (in, out): PEFT takes the transpose of B @ A, and the blocks come from
    Aᵀ @ Bᵀ. `rounded_to` is the dtype of 16-bit factors, to which PEFT rounds the scaled product on a CPU.
    """

    left: torch.Tensor
    right: torch.Tensor
    transposed: bool
    rounded_to: torch.dtype | None

    @classmethod
    def of(cls, lora_a: torch.Tensor, lora_b: torch.Tensor, *, transposed: bool) -> Factors:
        a, b, rounded_to = _aligned(lora_a.detach()), _aligned(lora_b.detach()), None
        if b.device.type == "cpu" and b.dtype in HALVES:
            a, b, rounded_to = a.float(), b.float(), b.dtype
        return cls(a.T, b.T, transposed, rounded_to) if transposed else cls(b, a, transposed, rounded_to)

    def whole(self) -> torch.Tensor:
        """PEFT's own expression."""
        return (self.right.T @ self.left.T).T if self.transposed else self.left @ self.right

    def proved(self, blocks: tuple[slice, ...]) -> bool:
        """Whether the product may be made in these blocks of rows."""
        if len(blocks) == 1:
            return False
        with ONE_PROOF_AT_A_TIME:
            return _proved(
                rows=self.left.shape[0],
                columns=self.right.shape[1],
                rank=self.left.shape[1],
                dtype=self.left.dtype,
                transposed=self.transposed,
                starts=tuple(block.start for block in blocks),
                threads=torch.get_num_threads(),
            )


@functools.cache
def _proved(
    *,
    rows: int,
    columns: int,
    rank: int,
    dtype: torch.dtype,
    transposed: bool,
    starts: tuple[int, ...],
    threads: int,
) -> bool:
    """Step 3 for these shapes. The result is a property of this machine."""
    del threads  # part of the key, because the bits could depend on it
    blocks = [slice(*ends) for ends in zip(starts, (*starts[1:], None), strict=True)]
    left_out, right_in = (columns, rows) if transposed else (rows, columns)
    generator = torch.Generator().manual_seed(0)
    for _ in range(PROOF_ELEMENTS // (rows * columns) + 1):
        lora_a = torch.randn(rank, right_in, generator=generator, dtype=dtype)
        lora_b = torch.randn(left_out, rank, generator=generator, dtype=dtype)
        factors = Factors.of(lora_a, lora_b, transposed=transposed)
        whole = factors.whole()
        for block in blocks:
            out = torch.empty(whole[block].shape, dtype=dtype)  # row-major, as in `Delta`: MKL's bits depend on it
            if not torch.equal(multiplied(factors.left[block], factors.right, out), whole[block]):
                return False
    return True


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, row-major and aligned as torch's allocator aligns."""
    dense = tensor.contiguous()
    return dense if dense.data_ptr() % ALIGNMENT_BYTES == 0 else dense.clone()
