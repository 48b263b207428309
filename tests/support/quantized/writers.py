"""Writes a weight in each format, by reference kernels: codes to the nearest, in groups of 32 or the format's own.

Files that the formats' own tools wrote are in tests/features/quantized/written.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import numpy as np
import torch
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from tests.support.quantized.checkpoints import Tensors

GROUP = 32

Writer = Callable[[torch.Tensor], Tensors]


def packed(codes: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """Codes (rows, n) as a stream of bits in int32 words."""
    stream = (codes.numpy().astype(np.uint8)[..., None] >> np.arange(bits)) & 1
    words = np.packbits(stream.reshape(len(codes), -1), axis=1, bitorder="little").view(np.int32)
    return torch.from_numpy(words)


def grid(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """4-bit codes (rows, columns), and float16 scales and codes of zero (rows, groups)."""
    groups = weight.view(len(weight), -1, GROUP)
    lowest = groups.amin(2).clamp(max=0)
    scales = ((groups.amax(2) - lowest) / 15).clamp(min=1e-6).half()
    zeros = (-lowest / scales).round().clamp(1, 15)
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    return codes.view(weight.shape), scales, zeros


def gptq(weight: torch.Tensor) -> Tensors:
    codes, scales, zeros = grid(weight)
    return {"qweight": packed(codes).T, "scales": scales.T, "qzeros": packed((zeros - 1).T)}


def awq(weight: torch.Tensor) -> Tensors:
    codes, scales, zeros = grid(weight)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    words = [packed(part.T.reshape(part.shape[1], -1, 8)[..., order].flatten(1)) for part in (codes, zeros)]
    return {"qweight": words[0], "scales": scales.T, "qzeros": words[1]}


def pack_quantized(weight: torch.Tensor) -> Tensors:
    codes, scales, zeros = grid(weight)
    return {
        "weight_packed": packed(codes),
        "weight_scale": scales,
        "weight_zero_point": packed(zeros.T).T,
        "weight_shape": torch.tensor(weight.shape),
    }


def mlx(weight: torch.Tensor) -> Tensors:
    groups = weight.view(len(weight), -1, GROUP)
    low, high = groups.amin(2), groups.amax(2)
    edge, sign = torch.where(-low > high, low, high), torch.where(-low > high, 1, -1)
    scales = sign * ((high - low) / 15).clamp(min=1e-7)
    first = (edge / scales).round()
    scales = torch.where(first == 0, scales, edge / first)
    codes = ((groups - edge[..., None]) / scales[..., None]).round().clamp(0, 15).view(weight.shape)
    return {"weight": packed(codes).view(torch.uint32), "scales": scales.half(), "biases": edge.half()}


def fp8(weight: torch.Tensor) -> Tensors:
    quantizer = SimpleNamespace(quantization_config=FineGrainedFP8Config(weight_block_size=(64, 64)))
    return {
        name.removeprefix("a."): tensor for name, tensor in Fp8Quantize(quantizer).convert({"a.weight": weight}).items()
    }


def bitsandbytes_4bit(weight: torch.Tensor) -> Tensors:
    layer = bitsandbytes.nn.Linear4bit(*weight.T.shape, bias=False, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(weight, False, quant_type="nf4")
    return dict(layer.to("cpu").state_dict())


def bitsandbytes_8bit(weight: torch.Tensor) -> Tensors:
    layer = bitsandbytes.nn.Linear8bitLt(*weight.T.shape, bias=False, has_fp16_weights=False)
    layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False)
    return dict(layer.to("cpu").state_dict())


COMPRESSED = {"quant_method": "compressed-tensors", "config_groups": {}}

FORMATS: dict[str, tuple[Writer, dict[str, Any]]] = {
    "GPTQ": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP}),
    "AWQ": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
    "compressed-tensors": (pack_quantized, COMPRESSED | {"format": "pack-quantized"}),
    "MLX": (mlx, {"bits": 4, "group_size": GROUP}),
    "FP8": (fp8, {"quant_method": "fp8", "weight_block_size": [64, 64]}),
    "bitsandbytes 4": (bitsandbytes_4bit, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bitsandbytes 8": (bitsandbytes_8bit, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}
"""The writer of each format, and its settings in config.json."""


def written_in(name: str, tensors: Tensors, ends: tuple[str, ...] = ("_proj.weight",)) -> Tensors:
    """Tensors of a model whose layers (by these ends of names) are in a format, and whose others are in bfloat16."""
    made: Tensors = {}
    for stored, tensor in tensors.items():
        if stored.endswith(ends):
            parts = FORMATS[name][0](tensor.float())
            made |= {f"{stored.removesuffix('weight')}{part}": value for part, value in parts.items()}
        else:
            made[stored] = tensor.bfloat16()
    return made
