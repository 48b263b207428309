"""A bitsandbytes weight in blocks of rows: what it stands for, and what it becomes when it is quantised again.

In: the packed weight and its scales, and rows of merged values. Out: the values of those rows once quantised and
dequantised, and the new scales. bitsandbytes' own functions do it, as in PEFT's merge of whole tensors
(peft/tuners/lora/bnb.py). Knows no PEFT, no models, no files; measures nothing.

- 8 bits: each row has a scale of its own, so that a block of rows is quantised as the whole is.
- 4 bits: every 64 values of a row have a scale of their own. Rows whose length is a multiple of that are independent,
  others are left to PEFT. With double quantisation the scales are quantised in turn, all of a weight together: so all
  rows are quantised before the first is dequantised.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

NESTED_BLOCK = 256
"""Scales that share a scale, with double quantisation (bitsandbytes/functional.py, `quantize_4bit`)."""

STORED = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that a 4-bit weight may stand for."""


class Requantized(Protocol):
    """A weight in the making: rows are put in, each once; then the scales are settled; then values come out."""

    def put(self, rows: slice, values: torch.Tensor) -> None: ...

    def settle(self) -> dict[str, torch.Tensor]:
        """The scales, by the names that engine/quantized.py gives them."""
        ...

    def rows(self, rows: slice) -> torch.Tensor: ...


class Int8Values:
    """An 8-bit weight, (out, in) integers with one float32 scale per row; its values are float32."""

    dtype = torch.float32

    def __init__(self, integers: torch.Tensor, scales: torch.Tensor) -> None:
        self._integers, self._scales = integers, scales
        self.shape, self.device = (integers.shape[0], integers.shape[1]), integers.device

    @classmethod
    def of(cls, weight: Any, scales: torch.Tensor | None) -> Int8Values | None:
        """None where this is not a plain 8-bit weight with its row scales."""
        if scales is None or weight.dtype is not torch.int8 or weight.dim() != 2 or not weight.numel():  # noqa: PLR2004
            return None
        if scales.shape != weight.shape[:1] or scales.device != weight.device or scales.dtype is not torch.float32:
            return None
        return cls(weight.data, scales.detach())

    def rows(self, rows: slice) -> torch.Tensor:
        from bitsandbytes import functional  # noqa: PLC0415 - slow to import, needed by few bases

        values: torch.Tensor = functional.int8_vectorwise_dequant(self._integers[rows], self._scales[rows])
        return values

    def sampled(self, step: int) -> Int8Values:
        return Int8Values(self._integers[::step].contiguous(), self._scales[::step].contiguous())

    def requantized(self, dtype: torch.dtype) -> Requantized:
        del dtype  # whatever it is, bitsandbytes quantises it from float16
        return _Int8Again(torch.empty_like(self._integers), torch.empty_like(self._scales))


class _Int8Again(Int8Values):
    def put(self, rows: slice, values: torch.Tensor) -> None:
        from bitsandbytes import functional  # noqa: PLC0415

        self._integers[rows], self._scales[rows], _ = functional.int8_vectorwise_quant(values.to(torch.float16))

    def settle(self) -> dict[str, torch.Tensor]:
        return {"SCB": self._scales}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a 4-bit weight is quantised, and is quantised again by PEFT."""

    blocksize: int
    quant_type: str
    nested: bool


class Int4Values:
    """A 4-bit weight: two values in a byte, one scale for every `blocksize` values of a row."""

    def __init__(self, packed: torch.Tensor, scales: torch.Tensor, settings: Settings, dtype: torch.dtype) -> None:
        """Args: (out, in / 2) bytes; (out, in / blocksize) float32."""
        self._packed, self._scales, self._settings = packed, scales, settings
        self.dtype, self.device = dtype, packed.device
        self.shape = (packed.shape[0], 2 * packed.shape[1])

    @classmethod
    def of(cls, weight: Any) -> Int4Values | None:
        """None where this is not a 4-bit weight whose rows have scales of their own."""
        from bitsandbytes import functional  # noqa: PLC0415

        state = weight.quant_state
        repacked = getattr(state, "packing_format_for_cpu", False)  # by a forward pass
        if len(state.shape) != 2 or state.shape[1] % state.blocksize or state.dtype not in STORED or repacked:  # noqa: PLR2004
            return None
        if weight.blocksize != state.blocksize or not weight.numel():
            return None
        scales = state.absmax
        if state.nested:
            scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        settings = Settings(blocksize=state.blocksize, quant_type=weight.quant_type, nested=weight.compress_statistics)
        rows = state.shape[0]
        return cls(weight.data.view(torch.uint8).view(rows, -1), scales.float().view(rows, -1), settings, state.dtype)

    def rows(self, rows: slice) -> torch.Tensor:
        from bitsandbytes import functional  # noqa: PLC0415

        packed = self._packed[rows]
        state = functional.QuantState(
            absmax=self._scales[rows],
            shape=torch.Size((packed.shape[0], self.shape[1])),
            blocksize=self._settings.blocksize,
            quant_type=self._settings.quant_type,
            dtype=self.dtype,
        )
        values: torch.Tensor = functional.dequantize_4bit(packed.reshape(-1, 1), state)
        return values

    def sampled(self, step: int) -> Int4Values:
        """Every `step`-th row; quantised again, these rows keep their scales as they are: an estimate."""
        settings = replace(self._settings, nested=False)
        return Int4Values(self._packed[::step].contiguous(), self._scales[::step].contiguous(), settings, self.dtype)

    def requantized(self, dtype: torch.dtype) -> Requantized:
        return _Int4Again(torch.empty_like(self._packed), torch.empty_like(self._scales), self._settings, dtype)


class _Int4Again(Int4Values):
    def put(self, rows: slice, values: torch.Tensor) -> None:
        from bitsandbytes import functional  # noqa: PLC0415

        packed, state = functional.quantize_4bit(
            values.contiguous(), blocksize=self._settings.blocksize, quant_type=self._settings.quant_type
        )
        self._packed[rows], self._scales[rows] = packed.view(len(values), -1), state.absmax.view(len(values), -1)
        self._code = state.code

    def settle(self) -> dict[str, torch.Tensor]:
        from bitsandbytes import functional  # noqa: PLC0415

        if not self._settings.nested:
            return {"absmax": self._scales.flatten(), "quant_map": self._code}
        scales = self._scales.flatten()
        offset = scales.mean()
        integers, state = functional.quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
        self._scales = (functional.dequantize_blockwise(integers, state) + offset).view(self._scales.shape)
        return {
            "quant_map": self._code,
            "nested_absmax": state.absmax,
            "nested_quant_map": state.code,
            "nested_offset": offset,
        }
