"""Real PEFT layers with pseudo-random contents, and the two merges of them: PEFT's, and the one in blocks."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import bitsandbytes
import torch
from peft import LoraConfig
from peft.tuners.lora import bnb as lora_bnb
from peft.tuners.lora import layer as lora_layer
from transformers.pytorch_utils import Conv1D

from merge_gate.engine.blocks.block_merge import BlockMerge, merged_blocks
from merge_gate.engine.blocks.delta import LowRankUpdate
from merge_gate.engine.tensors.quantized import dequantized, is_quantized, scales
from merge_gate.engine.tensors.threads import Buffers

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float64: torch.int64}
DENSE = ("linear", "conv1d", "embedding")
QUANTIZED = ("8bit", "4bit", "4bit-double")
PACKED = (*QUANTIZED, "fp4", "fp4-double")


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def base_layer(kind: str, rows: int, columns: int, dtype: torch.dtype) -> torch.nn.Module:
    """A module of the base whose delta is (rows, columns), lora_B @ lora_A."""
    weight = torch.randn(rows, columns).mul(0.05).to(dtype)
    if kind == "linear":
        module: Any = torch.nn.Linear(columns, rows, bias=False).to(dtype)
    elif kind == "conv1d":
        module, weight = Conv1D(rows, columns).to(dtype), weight.T.contiguous()
    elif kind == "embedding":
        module, weight = torch.nn.Embedding(columns, rows).to(dtype), weight.T.contiguous()
    else:
        return quantized_layer(kind, weight)
    module.weight.data.copy_(weight)
    return module


def quantized_layer(kind: str, weight: torch.Tensor, quant_type: str | None = None) -> torch.nn.Module:
    rows, columns = weight.shape
    quant_type = quant_type or ("fp4" if kind.startswith("fp4") else "nf4")
    if kind == "8bit":
        module: Any = bitsandbytes.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
        module.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        settings = {"compress_statistics": kind.endswith("-double"), "quant_type": quant_type}
        module = bitsandbytes.nn.Linear4bit(columns, rows, bias=False, **settings)
        module.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, module=module, **settings)
    return module.to("cpu")


def tuner_layer(
    kind: str,
    rows: int,
    columns: int,
    rank: int,
    *,
    dora: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    factor_dtype: torch.dtype = torch.float32,
    scaling: float = 2.0,
    size: float = 0.1,
    seed: int = 0,
) -> Any:
    """PEFT's layer around it, with its factors in the dtype that PEFT loads them in."""
    torch.manual_seed(seed)
    base = base_layer(kind, rows, columns, dtype)
    config = LoraConfig(r=rank, use_dora=dora, fan_in_fan_out=kind == "conv1d")
    if kind in PACKED:
        made = lora_bnb.Linear8bitLt if kind == "8bit" else lora_bnb.Linear4bit
    else:
        made = lora_layer.Embedding if kind == "embedding" else lora_layer.Linear
    layer = made(base, "default", config, r=rank, lora_alpha=8)
    for factor in factors(layer):
        factor.data = torch.randn(factor.shape).mul(size).to(factor_dtype)
    for magnitude in layer.lora_magnitude_vector.values():
        magnitude.weight.data = torch.rand(magnitude.weight.shape).add(0.5).to(factor_dtype)
    layer.scaling["default"] = scaling
    return layer


def factors(layer: Any) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    if isinstance(layer, lora_layer.Embedding):
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def update_of(layer: Any) -> LowRankUpdate:
    lora_a, lora_b = factors(layer)
    dora = "default" in layer.lora_magnitude_vector
    return LowRankUpdate(
        lora_a=lora_a.data,
        lora_b=lora_b.data,
        scaling=layer.scaling["default"],
        transposed=isinstance(layer, lora_layer.Embedding) or layer.fan_in_fan_out,
        magnitude=layer.lora_magnitude_vector["default"].weight.data if dora else None,
    )


def in_blocks(layer: Any, *, block_elements: int = 1) -> BlockMerge:
    weight = layer.get_base_layer().weight
    buffers, scales_of_rows = Buffers(block_elements=block_elements), getattr(weight, "SCB", None)
    return merged_blocks(weight, update_of(layer), buffers, row_scales=scales_of_rows)


def whole(merge: BlockMerge) -> torch.Tensor:
    """The merged weight, put together from its blocks."""
    blocks = [(rows, merged.clone()) for rows, merged, _ in merge]
    assert [rows.start for rows, _ in blocks] == [0, *(rows.stop for rows, _ in blocks[:-1])]
    return torch.cat([merged for _, merged in blocks])


def base_values(layer: Any) -> torch.Tensor:
    module = layer.get_base_layer()
    return dequantized(module, module.weight) if is_quantized(module.weight) else module.weight.data.clone()


def by_peft(layer: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What PEFT's merge leaves: the values of the weight and its scales."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Merge lora module to .-bit linear")
        layer.merge(safe_merge=True)
    module = layer.get_base_layer()
    found = dict(scales(module, module.weight)) if is_quantized(module.weight) else {}
    return base_values(layer), found


def before_the_check(layer: Any) -> torch.Tensor:
    """What PEFT's safe_merge of a dense weight looks at, for merges that it refuses."""
    with torch.no_grad():
        weight = layer.get_base_layer().weight.data.clone()
        if "default" in layer.lora_variant:
            return layer.lora_variant["default"].merge_safe(layer, "default", weight)
        weight += layer.get_delta_weight("default").to(weight.dtype)
    return weight


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Bit by bit; a NaN equals any NaN, since PEFT's own NaN payload depends on the vector width."""
    both_nan = left.isnan() & right.isnan()
    bits = BITS[left.dtype]
    return left.dtype == right.dtype and bool(((left.view(bits) == right.view(bits)) | both_nan).all())
