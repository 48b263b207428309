"""Values → 4 bits on a CPU, with the bits of bitsandbytes, in a quarter of its time.

In: values, the number of them that share a scale, and the 4-bit type. Out: packed codes and scales, or None if
bitsandbytes' own function has to make them. Knows no PEFT, no models, no files; judges nothing.

1. Scale the values as bitsandbytes does (backends/default/ops.py, `quantize_4bit`).
2. A code is the number of bounds below the scaled value. bitsandbytes finds it by bisection, in whole weights. Here
   each of the 15 bounds is compared with all values of a block in cache, and the results are added. That is exact.
3. bitsandbytes cross-checks this: once per process on values of all sizes and on the bounds themselves, and on the
   first values of every weight of a base.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from merge_gate.engine.tensors.threads import spread

LEAST_SCALE = 1e-38
"""The least scale that bitsandbytes divides by."""

BLOCK = 1 << 18
"""Number of values that are quantized at once: 1 MiB in float32."""

CROSS_CHECKED = 1 << 14
"""Number of values per weight that bitsandbytes quantizes too, as a cross-check."""

STORED = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that bitsandbytes quantizes."""

Packed = tuple[torch.Tensor, torch.Tensor]
"""Two codes in each byte, (n / 2, 1), and a float32 scale for every `blocksize` values."""


@functools.cache
def bnb() -> Any:
    """The functions of bitsandbytes."""
    from bitsandbytes import functional  # noqa: PLC0415 - slow to import, needed by few bases

    return functional


@functools.cache
def _quantize_4bit() -> Any:
    """The function of bitsandbytes, even while a base loads and `loading_in_blocks` has replaced it."""
    return bnb().quantize_4bit


def quantized(values: torch.Tensor, blocksize: int, quant_type: str) -> Packed | None:
    """A few values in 4 bits. None if they are not finite, not on a CPU, or if this bitsandbytes has other bits."""
    suits = values.device.type == "cpu" and values.dtype in STORED and values.numel() and not values.numel() % blocksize
    if not suits or not _proved(blocksize, quant_type, values.dtype):
        return None
    return _counted(values, blocksize, quant_type)


def _counted(values: torch.Tensor, blocksize: int, quant_type: str) -> Packed | None:
    scaled = values.to(torch.float32, copy=True, memory_format=torch.contiguous_format).view(-1, blocksize)
    scales = scaled.abs().amax(1)
    if not bool(scales.isfinite().all()):
        return None
    scaled.mul_((1.0 / scales.clamp(min=LEAST_SCALE))[:, None]).clamp_(-1, 1)
    pairs = codes(scaled, quant_type).view(torch.int16)  # the first of two in the lower byte
    packed = (pairs & 0xFF).bitwise_left_shift_(4).bitwise_or_(pairs >> 8).to(torch.uint8)
    return packed.view(-1, 1), scales


def codes(scaled: torch.Tensor, quant_type: str) -> torch.Tensor:
    """Step 2 for float32 values between -1 and 1."""
    bounds, order = _bounds(quant_type)
    below = torch.zeros(scaled.shape, dtype=torch.uint8, device=scaled.device)
    is_below = torch.empty(scaled.shape, dtype=torch.bool, device=scaled.device)
    for bound in bounds:
        torch.gt(scaled, bound, out=is_below)
        below.add_(is_below.view(torch.uint8))
    return below if order is None else order.to(scaled.device)[below.int()]


@functools.cache
def _bounds(quant_type: str) -> tuple[list[float], torch.Tensor | None]:
    """The bounds between the sorted values of a 4-bit type, and the codes of these values if they are not sorted."""
    values, order = bnb().get_4bit_type(quant_type, device="cpu").sort()
    middles = ((values[:-1] + values[1:]) / 2).tolist()
    return middles, None if torch.equal(order, torch.arange(len(order))) else order.to(torch.uint8)


@functools.cache
def _proved(blocksize: int, quant_type: str, dtype: torch.dtype) -> bool:
    """Step 3: whether bitsandbytes has the same bits for values of all sizes, for the bounds, and next to them."""
    values = torch.randn(1 << 10, blocksize, generator=torch.Generator().manual_seed(0))
    middles = torch.tensor(_bounds(quant_type)[0])
    edges = torch.cat((middles, middles.nextafter(torch.ones(())), middles.nextafter(-torch.ones(()))))
    values[: len(edges)].clamp_(-1, 1)
    values[: len(edges), 0], values[: len(edges), 1] = edges, 1.0
    values[len(edges) :] *= torch.logspace(-44, 30, len(values) - len(edges), dtype=torch.float64)[:, None]
    largest = torch.finfo(dtype).max
    values = values.clamp(-largest, largest).to(dtype)
    found = _counted(values, blocksize, quant_type)
    packed, state = _quantize_4bit()(values, blocksize=blocksize, quant_type=quant_type)
    return found is not None and torch.equal(found[0], packed) and torch.equal(found[1], state.absmax)


# --- a base that is quantized while it loads -----------------------------------------------------------------------


@contextmanager
def loading_in_blocks() -> Iterator[None]:
    """Inside of this context, the layers of bitsandbytes are quantized in blocks, on all cores."""
    own = _quantize_4bit()

    @functools.wraps(own)
    def in_blocks(A: torch.Tensor, *rest: Any, **named: Any) -> Any:  # noqa: N803 - bitsandbytes' own name
        made = None if rest else _in_blocks(A, **named)
        return own(A, *rest, **named) if made is None else made

    bnb().quantize_4bit = in_blocks
    try:
        yield
    finally:
        bnb().quantize_4bit = own


def _in_blocks(
    weight: torch.Tensor,
    *,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
    **others: Any,
) -> tuple[torch.Tensor, Any] | None:
    """The same result as bitsandbytes' function; None for options that are not handled here."""
    sharing = blocksize or 64
    if others or compress_statistics or quant_storage is not torch.uint8:
        return None
    blocks = torch.split(weight.contiguous().view(-1), BLOCK)
    found = list(spread(lambda block: quantized(block, sharing, quant_type), blocks))
    made = [one for one in found if one is not None]
    if len(made) < len(found):
        return None
    packed, state = _quantize_4bit()(blocks[0][:CROSS_CHECKED], blocksize=sharing, quant_type=quant_type)
    ours = made[0][0][: len(packed)], made[0][1][: len(state.absmax)]
    if not (torch.equal(ours[0], packed) and torch.equal(ours[1], state.absmax)):
        return None
    state.absmax, state.shape = torch.cat([scales for _, scales in made]), weight.shape
    return torch.cat([packed for packed, _ in made]), state
