"""What a quantised weight stands for: its values after dequantising, and the scales they are made with.

In: a module of bitsandbytes and its weight. Out: plain tensors to measure. A packed integer is always finite; a NaN
scale is not, and it shows only in the values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

BNB_4BIT = "Params4bit"
BNB_8BIT = "Int8Params"


def is_quantized(tensor: torch.Tensor) -> bool:
    """Whether this is a bitsandbytes parameter that holds packed integers."""
    kind = type(tensor).__name__
    return (kind == BNB_4BIT and getattr(tensor, "quant_state", None) is not None) or (
        kind == BNB_8BIT and tensor.dtype is torch.int8
    )


def row_scales(module: nn.Module, weight: Any) -> torch.Tensor | None:
    """Of an 8-bit weight: on the parameter, or in the module's state once PEFT or a forward moved them; else None."""
    if type(weight).__name__ != BNB_8BIT:
        return None
    scale = getattr(weight, "SCB", None)
    if scale is None:
        scale = getattr(getattr(module, "state", None), "SCB", None)
    return scale


def elements(tensor: torch.Tensor) -> int:
    """How many values a tensor stands for: of a 4-bit weight, two for each byte."""
    state = getattr(tensor, "quant_state", None) if type(tensor).__name__ == BNB_4BIT else None
    return tensor.numel() if state is None else math.prod(state.shape)


def dequantized(module: nn.Module, weight: Any) -> torch.Tensor:
    """The values that a quantised weight stands for, in the shape of the layer (out_features, in_features)."""
    from bitsandbytes import functional  # noqa: PLC0415 - slow to import, needed by few bases

    if type(weight).__name__ == BNB_4BIT:
        values: torch.Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
        return values
    scale = row_scales(module, weight)
    if scale is None:
        return torch.full(tuple(weight.shape), torch.nan)  # a weight without its scales stands for nothing
    rows: torch.Tensor = functional.int8_vectorwise_dequant(weight.data, scale.to(weight.device))
    return rows


def scales(module: nn.Module, weight: Any) -> list[tuple[str, torch.Tensor]]:
    """(suffix, tensor) of every scale that the weight's values depend on."""
    if type(weight).__name__ == BNB_8BIT:
        scale = row_scales(module, weight)
        return [] if scale is None else [("SCB", scale)]
    state = weight.quant_state
    found = [("absmax", state.absmax), ("quant_map", state.code)]
    if state.nested:
        found += [("nested_absmax", state.state2.absmax), ("nested_quant_map", state.state2.code)]
        found.append(("nested_offset", state.offset))
    return [(name, tensor) for name, tensor in found if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()]
