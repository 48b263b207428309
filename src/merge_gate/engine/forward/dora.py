"""Runs layers of DoRA without PEFT's product of an identity matrix, which costs more than the rest of the model.

In: a model with PEFT's layers. Each layer of DoRA gets the norms of W + scaling · B @ A from a few rows at a time.
PEFT's own forward computes the rest.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

BLOCK_ELEMENTS = 1 << 20
"""Elements of W that are in float32 at the same time: 4 MiB, which stay in the processor's cache."""


def with_norms_in_blocks(model: nn.Module) -> None:
    """Let the layers of DoRA in a model compute their norms this way."""
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "get_weight_norm"):
            layer.forward = functools.partial(_forward, layer)


def _forward(layer: Any, x: torch.Tensor, *, base_layer: Any, **given: Any) -> Any:
    """PEFT's forward. It needs the weights for their norms alone, so it gets one number in their shape."""
    norms = _norms(layer, base_layer.weight, given["lora_A"], given["lora_B"], given["scaling"])
    outline = norms.new_empty(()).expand(base_layer.weight.shape)
    layer.get_lora_weight, layer.get_weight_norm = (lambda **_: outline), (lambda **_: norms)
    inner = SimpleNamespace(weight=outline, bias=getattr(base_layer, "bias", None))
    return type(layer).forward(layer, x, base_layer=inner, **given)


def _norms(layer: Any, weight: torch.Tensor, lora_a: Any, lora_b: Any, scaling: float) -> torch.Tensor:
    """The norm of each output of W + scaling · B @ A, in the shape in which PEFT has it."""
    # the layer of an embedding gets Aᵀ and Bᵀ, and no modules
    a, b = (one.weight.flatten(1) if hasattr(one, "weight") else one.T for one in (lora_a, lora_b))
    left, right = (a.T, b.T) if layer.fan_in_fan_out else (b, a)
    rows, dim = weight.flatten(1), 0 if layer.fan_in_fan_out else 1
    parts = zip(*(one.split(max(1, BLOCK_ELEMENTS // rows.shape[1])) for one in (rows, left)), strict=True)
    norms = [part.to(a.dtype, copy=True).addmm_(of_part, right, alpha=scaling).norm(dim=dim) for part, of_part in parts]
    joined = torch.stack(norms).norm(dim=0) if dim == 0 else torch.cat(norms)
    return joined if weight.dim() == 2 else joined.view(1, -1, *[1] * (weight.dim() - 2))  # noqa: PLR2004
