"""Replaces the weights of a base that was quantized during the load with plain weights, for merging QLoRA adapters.

In: a loaded model with layers of bitsandbytes, and a dtype. Out: the same model with plain layers, whose weights are
the values of the packed weights. Knows no PEFT.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from merge_gate.engine.tensors.quantized import dequantized, is_quantized


def with_plain_layers(model: Any, dtype: torch.dtype) -> Any:
    """Replace each packed layer by the layer that it was before, as `model.dequantize` does. Changes the model."""
    for path, module in list(model.named_modules()):
        weight = module._parameters.get("weight")
        if weight is not None and is_quantized(weight):
            model.set_submodule(path, _plain(module, dequantized(module, weight).to(dtype)))
    model.is_quantized = False
    return model


def _plain(module: Any, values: torch.Tensor) -> nn.Module:
    """A linear layer. transformers packs the transposed weight of a Conv1D."""
    outputs, inputs = values.shape
    is_transposed = issubclass(module.source_cls, Conv1D)
    with torch.device("meta"):
        plain: nn.Module = Conv1D(outputs, inputs) if is_transposed else nn.Linear(inputs, outputs)
    plain.weight = nn.Parameter(values.T.contiguous() if is_transposed else values, requires_grad=False)
    plain.bias = module.bias
    return plain
