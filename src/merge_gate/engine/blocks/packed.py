"""A bitsandbytes weight in blocks of rows: its values, and its values after it is quantized again.

In: the packed weight and its scales, and rows of merged values. Out: those rows after quantizing and dequantizing, or
only their least and greatest values, and the new scales. bitsandbytes' own functions do this, as in PEFT's merge of
whole tensors (peft/tuners/lora/bnb.py). Knows no PEFT, no models, no files; judges nothing.

- 8 bits: each row has its own scale, so a block of rows is quantized as the whole is.
- 4 bits: every 64 values of a row have their own scale. If the length of a row is a multiple of that, rows are
  independent; PEFT merges other weights. Double quantization also quantizes the scales of a weight, all together. So
  all rows are quantized before the first is dequantized.

Quantizing is monotone: among the values that share a scale, the least stays the least and the greatest the greatest.
The scale is the larger absolute value of the two. So the extremes and scales of the result follow from 2 values in 64,
and the code of each value, which takes longer than everything else, need not be looked up.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

from merge_gate.engine.tensors.quantized import LEAST_SCALE, STORED, bnb, codes, quantized

NESTED_BLOCK = 256
"""Number of scales that share a scale, with double quantization (bitsandbytes/functional.py, `quantize_4bit`)."""

LEAST_BLOCK = 32
"""Least number of values that share a scale, in 4 bits."""

ENDS_AT_ONCE = 1 << 13
"""Number of scales whose extremes are dequantized together, in 1 MiB."""

Scales = dict[str, torch.Tensor]
"""By the suffixes in engine/tensors/quantized.py: `SCB`, `absmax`, …"""


# --- 8 bits ---------------------------------------------------------------------------------------------------------


class Int8Values:
    """An 8-bit weight, (out, in) integers with one float32 scale per row; its values are float32."""

    dtype = torch.float32

    def __init__(self, integers: torch.Tensor, scales: torch.Tensor) -> None:
        self._integers, self._scales = integers, scales
        self.shape, self.device = (integers.shape[0], integers.shape[1]), integers.device

    @classmethod
    def of(cls, weight: Any, scales: torch.Tensor | None) -> Int8Values | None:
        """None if this is not a plain 8-bit weight with its row scales."""
        if scales is None or weight.dtype is not torch.int8 or weight.dim() != 2 or not weight.numel():  # noqa: PLR2004
            return None
        if scales.shape != weight.shape[:1] or scales.device != weight.device or scales.dtype is not torch.float32:
            return None
        return cls(weight.data, scales.detach())

    def rows(self, rows: slice) -> torch.Tensor:
        values: torch.Tensor = bnb().int8_vectorwise_dequant(self._integers[rows], self._scales[rows])
        return values

    def sampled(self, step: int) -> Int8Values:
        return Int8Values(self._integers[::step].contiguous(), self._scales[::step].contiguous())

    def requantized(self, dtype: torch.dtype) -> _Int8Again:
        del dtype  # bitsandbytes quantizes from float16 in any case
        return _Int8Again(torch.empty_like(self._integers), torch.empty_like(self._scales))

    def extremes(self, dtype: torch.dtype) -> _Int8Extremes:
        del dtype
        return _Int8Extremes(self.shape[0], self.device)


class _Int8Again(Int8Values):
    """A weight that is being quantized: `put` every row once, then `finish` the scales, then read `rows`."""

    def put(self, rows: slice, values: torch.Tensor) -> None:
        self._integers[rows], self._scales[rows], _ = bnb().int8_vectorwise_quant(values.to(torch.float16))

    def finish(self) -> Scales:
        return {"SCB": self._scales}


class _Int8Extremes:
    """Like `_Int8Again`, but only the minimum and maximum of the values that share a scale can be read.

    `of` gives (2, rows, scales per row), and `finish` the same for the values of all rows after they were quantized.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._ends = torch.empty(2, rows, 1, dtype=torch.float16, device=device)

    @staticmethod
    def of(values: torch.Tensor) -> torch.Tensor:
        return torch.stack((values.amin(1, keepdim=True), values.amax(1, keepdim=True)))

    def put(self, rows: slice, values: torch.Tensor) -> None:
        self._ends[:, rows] = self.of(values)

    def finish(self) -> tuple[torch.Tensor, Scales]:
        integers, scales, _ = bnb().int8_vectorwise_quant(self._ends[:, :, 0].T.contiguous())
        return bnb().int8_vectorwise_dequant(integers, scales).T[:, :, None], {"SCB": scales}


# --- 4 bits ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a 4-bit weight is quantized, and how PEFT quantizes it again."""

    blocksize: int
    quant_type: str
    nested: bool

    def final_scales(self, scales: torch.Tensor) -> tuple[torch.Tensor, Scales]:
        """The scales for dequantizing, and the scales that are stored."""
        code = bnb().get_4bit_type(self.quant_type, device=scales.device)
        if not self.nested:
            return scales, {"absmax": scales, "quant_map": code}
        offset = scales.mean()
        integers, state = bnb().quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
        kept = {"nested_absmax": state.absmax, "nested_quant_map": state.code, "nested_offset": offset}
        return bnb().dequantize_blockwise(integers, state) + offset, {"quant_map": code, **kept}


class Int4Values:
    """A 4-bit weight: two values in a byte, one float32 scale for every `blocksize` values of a row."""

    def __init__(self, packed: torch.Tensor, scales: torch.Tensor, settings: Settings, dtype: torch.dtype) -> None:
        self._packed, self._scales, self._settings = packed, scales, settings
        self.dtype, self.device = dtype, packed.device
        self.shape = (packed.shape[0], 2 * packed.shape[1])

    @classmethod
    def of(cls, weight: Any) -> Int4Values | None:
        """None if this is not a 4-bit weight whose rows have their own scales."""
        state = weight.quant_state
        repacked = getattr(state, "packing_format_for_cpu", False)  # by a forward pass
        if len(state.shape) != 2 or state.shape[1] % state.blocksize or state.dtype not in STORED or repacked:  # noqa: PLR2004
            return None
        if weight.blocksize != state.blocksize or not weight.numel():
            return None
        scales = state.absmax
        if state.nested:
            scales = bnb().dequantize_blockwise(state.absmax, state.state2) + state.offset
        settings = Settings(blocksize=state.blocksize, quant_type=weight.quant_type, nested=weight.compress_statistics)
        rows = state.shape[0]
        return cls(weight.data.view(torch.uint8).view(rows, -1), scales.float().view(rows, -1), settings, state.dtype)

    def rows(self, rows: slice) -> torch.Tensor:
        packed = self._packed[rows]
        state = bnb().QuantState(
            absmax=self._scales[rows],
            shape=torch.Size((packed.shape[0], self.shape[1])),
            blocksize=self._settings.blocksize,
            quant_type=self._settings.quant_type,
            dtype=self.dtype,
        )
        values: torch.Tensor = bnb().dequantize_4bit(packed.reshape(-1, 1), state)
        return values

    def sampled(self, step: int) -> Int4Values:
        """Every `step`-th row. The scales of these rows are not quantized in turn, because that would need all rows."""
        settings = replace(self._settings, nested=False)
        return Int4Values(self._packed[::step].contiguous(), self._scales[::step].contiguous(), settings, self.dtype)

    def requantized(self, dtype: torch.dtype) -> _Int4Again:
        return _Int4Again(torch.empty_like(self._packed), torch.empty_like(self._scales), self._settings, dtype)

    def extremes(self, dtype: torch.dtype) -> _Int4Extremes | None:
        """None if this bitsandbytes does not quantize as `_quantized_ends` does."""
        proved = _ends_proved(self._settings.quant_type, self._settings.blocksize, dtype)
        return _Int4Extremes(self._scales.shape, self._settings, dtype, self.device) if proved else None


class _Int4Again(Int4Values):
    def put(self, rows: slice, values: torch.Tensor) -> None:
        blocksize, quant_type = self._settings.blocksize, self._settings.quant_type
        parts = quantized(values, blocksize, quant_type)
        if parts is None:
            packed, state = bnb().quantize_4bit(values.contiguous(), blocksize=blocksize, quant_type=quant_type)
            parts = packed, state.absmax
        self._packed[rows], self._scales[rows] = (part.view(len(values), -1) for part in parts)

    def finish(self) -> Scales:
        scales, kept = self._settings.final_scales(self._scales.flatten())
        self._scales = scales.view(self._scales.shape)
        return kept


class _Int4Extremes:
    def __init__(self, shape: torch.Size, settings: Settings, dtype: torch.dtype, device: torch.device) -> None:
        self._settings, self._dtype = settings, dtype
        self._ends = torch.empty(2, *shape, dtype=torch.float32, device=device)

    def of(self, values: torch.Tensor) -> torch.Tensor:
        sharing = values.view(len(values), -1, self._settings.blocksize)
        return torch.stack((sharing.amin(2), sharing.amax(2)))

    def put(self, rows: slice, values: torch.Tensor) -> None:
        self._ends[:, rows] = self.of(values)

    def finish(self) -> tuple[torch.Tensor, Scales]:
        ends = self._ends.flatten(1)
        scales = ends.abs().amax(0)
        used, kept = self._settings.final_scales(scales)
        values = _quantized_ends(ends, scales, used, self._settings.quant_type, self._dtype)
        return values.view(self._ends.shape), kept


def _quantized_ends(
    ends: torch.Tensor, scales: torch.Tensor, used: torch.Tensor, quant_type: str, dtype: torch.dtype
) -> torch.Tensor:
    """(2, n) values that define `n` scales, after bitsandbytes has quantized them and dequantized them with `used`."""
    halves = codes(torch.clamp(ends * (1.0 / scales.clamp(min=LEAST_SCALE)), -1, 1), quant_type)
    pairs = halves[0] << 4 | halves[1]
    some = [slice(start, start + ENDS_AT_ONCE) for start in range(0, len(used), ENDS_AT_ONCE)]
    return torch.cat([_pair_values(pairs[part], used[part], quant_type, dtype) for part in some], 1)


def _pair_values(pairs: torch.Tensor, used: torch.Tensor, quant_type: str, dtype: torch.dtype) -> torch.Tensor:
    """Two values for each scale. bitsandbytes takes blocks of at least 32 values, so each pair fills one block."""
    shape = torch.Size((len(pairs), LEAST_BLOCK))
    state = bnb().QuantState(absmax=used, shape=shape, blocksize=LEAST_BLOCK, quant_type=quant_type, dtype=dtype)
    packed = pairs[:, None].expand(-1, LEAST_BLOCK // 2).reshape(-1, 1)
    values: torch.Tensor = bnb().dequantize_4bit(packed, state)
    return values[:, :2].T


@functools.cache
def _ends_proved(quant_type: str, blocksize: int, dtype: torch.dtype) -> bool:
    """Whether bitsandbytes gets the same extremes and scales on pseudo-random values of all sizes."""
    values = torch.randn(1 << 10, blocksize, generator=torch.Generator().manual_seed(0))
    values *= torch.logspace(-44, 30, len(values), dtype=torch.float64)[:, None]
    largest = torch.finfo(dtype).max
    values = values.clamp(-largest, largest).to(dtype)
    packed, state = bnb().quantize_4bit(values, blocksize=blocksize, quant_type=quant_type)
    made = bnb().dequantize_4bit(packed, state).view(values.shape)
    ends = torch.stack((values.amin(1), values.amax(1))).float()
    scales = ends.abs().amax(0)
    quantized_ends = _quantized_ends(ends, scales, scales, quant_type, dtype)
    return torch.equal(scales, state.absmax) and torch.equal(quantized_ends, torch.stack((made.amin(1), made.amax(1))))
