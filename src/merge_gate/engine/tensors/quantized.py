"""Quantized bases, in two tables: how to load each kind, and how to get the values of each kind of packed weight.

In: a word of `Quantization`, or a module and its weight. Out: options for transformers; plain tensors to measure. A
packed integer is always finite, but its scale can be NaN, which shows only in the values.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoQuantizationConfig

from merge_gate.engine.tensors.four_bit import loading_in_blocks
from merge_gate.engine.tensors.measure import dtype_name
from merge_gate.records.terms import Quantization

BNB_4BIT = "Params4bit"
BNB_8BIT = "Int8Params"

QUANTIZED_AS = {BNB_4BIT: Quantization.BNB_4BIT, BNB_8BIT: Quantization.BNB_8BIT}
"""The packing of a parameter by its class."""


# --- loading -------------------------------------------------------------------------------------------------------


class Loader(NamedTuple):
    """How a base is quantized on loading: the configuration of transformers, by the dtype to compute in.

    `meanwhile` is a context that surrounds the load.
    """

    config: Callable[[torch.dtype], Any]
    meanwhile: Callable[[], AbstractContextManager[None]] = nullcontext


def _bnb_8bit(_compute: torch.dtype) -> Any:
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


def _bnb_4bit(compute: torch.dtype) -> Any:
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


LOADED_BY: Mapping[Quantization, Loader] = MappingProxyType(
    {Quantization.BNB_8BIT: Loader(_bnb_8bit), Quantization.BNB_4BIT: Loader(_bnb_4bit, loading_in_blocks)}
)


def loading_options(quantization: Quantization, dtype: str, device: str) -> dict[str, Any]:
    """What `from_pretrained` needs to quantize the base. `dtype` is the one asked for, or `auto`."""
    if quantization is Quantization.NONE:
        return {}
    compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    return {"quantization_config": LOADED_BY[quantization].config(compute), "device_map": {"": device}}


DEQUANTIZED = frozenset({"fp8", "mxfp8", "mxfp4", "compressed-tensors"})
"""Methods whose weights transformers dequantizes while it loads them, if it is asked to."""


def dequantizing_options(config: Any) -> dict[str, Any]:
    """What `from_pretrained` needs to dequantize a base that is stored quantized, on any machine; {} for other bases.

    Left alone, transformers decides by the machine: FP8 stays packed on some GPUs, and MXFP4 if `kernels` is installed.

    Args:
        config: the base's configuration as transformers reads it.

    Raises:
        ImportError: the package of this method is not installed.
    """
    text = config.get_text_config(decoder=True)  # as transformers/quantizers/auto.py
    declared = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)
    if not isinstance(declared, dict) or declared.get("quant_method") not in DEQUANTIZED:
        return {}
    asked = AutoQuantizationConfig.from_dict(dict(declared))
    asked.dequantize = True
    return {"quantization_config": asked}


def quantizing(quantization: Quantization) -> AbstractContextManager[None]:
    """A context for `from_pretrained` of such a base."""
    return nullcontext() if quantization is Quantization.NONE else LOADED_BY[quantization].meanwhile()


# --- packed weights ------------------------------------------------------------------------------------------------


class Packing(NamedTuple):
    """One kind of packed weight. `layers` is the name of PEFT's modules that have layers for it.

    `scales` gives (suffix, tensor) of every scale that the values depend on.
    """

    holds_integers: Callable[[Any], bool]
    elements: Callable[[Any], int]
    values: Callable[[nn.Module, Any], torch.Tensor]
    scales: Callable[[nn.Module, Any], list[tuple[str, torch.Tensor]]]
    layers: str


def _int4_values(_module: nn.Module, weight: Any) -> torch.Tensor:
    from bitsandbytes import functional  # noqa: PLC0415 - slow to import, needed by few bases

    values: torch.Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
    return values


def _int4_scales(_module: nn.Module, weight: Any) -> list[tuple[str, torch.Tensor]]:
    state = weight.quant_state
    found = [("absmax", state.absmax), ("quant_map", state.code)]
    if state.nested:
        found += [("nested_absmax", state.state2.absmax), ("nested_quant_map", state.state2.code)]
        found.append(("nested_offset", state.offset))
    return [(name, tensor) for name, tensor in found if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()]


def row_scales(module: nn.Module, weight: Any) -> torch.Tensor | None:
    """The scales of an 8-bit weight, else None.

    They are on the parameter, or in the module's state after PEFT or a forward pass moved them there.
    """
    if type(weight).__name__ != BNB_8BIT:
        return None
    scale = getattr(weight, "SCB", None)
    if scale is None:
        scale = getattr(getattr(module, "state", None), "SCB", None)
    return scale


def _int8_values(module: nn.Module, weight: Any) -> torch.Tensor:
    from bitsandbytes import functional  # noqa: PLC0415 - as above

    scale = row_scales(module, weight)
    if scale is None:
        return torch.full(tuple(weight.shape), torch.nan)  # a weight without its scales stands for nothing
    rows: torch.Tensor = functional.int8_vectorwise_dequant(weight.data, scale.to(weight.device))
    return rows


def _int8_scales(module: nn.Module, weight: Any) -> list[tuple[str, torch.Tensor]]:
    scale = row_scales(module, weight)
    return [] if scale is None else [("SCB", scale)]


PACKINGS: Mapping[str, Packing] = MappingProxyType(
    {
        BNB_4BIT: Packing(
            holds_integers=lambda weight: getattr(weight, "quant_state", None) is not None,
            elements=lambda weight: math.prod(weight.quant_state.shape),  # two in each byte
            values=_int4_values,
            scales=_int4_scales,
            layers="bnb",
        ),
        BNB_8BIT: Packing(
            holds_integers=lambda weight: weight.dtype is torch.int8,
            elements=lambda weight: int(weight.numel()),
            values=_int8_values,
            scales=_int8_scales,
            layers="bnb",
        ),
    }
)
"""By the name of the parameter's class."""


def _packing(tensor: torch.Tensor) -> Packing | None:
    found = PACKINGS.get(type(tensor).__name__)
    return found if found is not None and found.holds_integers(tensor) else None


def is_quantized(tensor: torch.Tensor) -> bool:
    """Whether this is a parameter that holds packed integers."""
    return _packing(tensor) is not None


def elements(tensor: torch.Tensor) -> int:
    """The number of values in a tensor, after unpacking."""
    found = _packing(tensor)
    return tensor.numel() if found is None else found.elements(tensor)


def dequantized(module: nn.Module, weight: Any) -> torch.Tensor:
    """The dequantized values of a weight, in the shape of the layer (out_features, in_features)."""
    return PACKINGS[type(weight).__name__].values(module, weight)


def scales(module: nn.Module, weight: Any) -> list[tuple[str, torch.Tensor]]:
    """(suffix, tensor) for every scale that the weight's values depend on."""
    return PACKINGS[type(weight).__name__].scales(module, weight)


def has_layers_in(module: str, weight: Any) -> bool:
    """Whether a module of PEFT, given by name, has layers for this kind of weight."""
    return module.rpartition(".")[2] == PACKINGS[type(weight).__name__].layers


def packings(model: Any) -> set[Quantization]:
    """The packings of the parameters of a model."""
    return {QUANTIZED_AS[type(one).__name__] for one in model.parameters() if is_quantized(one)}


def main_dtype(model: Any) -> torch.dtype:
    """The dtype of most of the parameters of floating point; for a packed model, the dtype of the unpacked weights."""
    sizes: Counter[torch.dtype] = Counter()
    for one in model.parameters():
        state = getattr(one, "quant_state", None)
        if is_quantized(one):
            sizes[getattr(state, "dtype", None) or model.dtype] += elements(one)
        elif one.is_floating_point():
            sizes[one.dtype] += one.numel()
    if not sizes:
        fallback: torch.dtype = getattr(model, "dtype", torch.float32)
        return fallback
    return sizes.most_common(1)[0][0]


def loaded_dtypes(tensors: Iterable[torch.Tensor]) -> tuple[tuple[str, float], ...]:
    """How many values of parameters have which dtype, the most first; empty if all have the same."""
    sizes: Counter[str] = Counter()
    for one in tensors:
        if isinstance(one, torch.nn.Parameter) or is_quantized(one):
            name = str(QUANTIZED_AS[type(one).__name__]) if is_quantized(one) else dtype_name(one.dtype)
            sizes[name] += elements(one)
    counts = sorted(sizes.items(), key=lambda pair: (-pair[1], pair[0]))
    return tuple(counts) if len(counts) > 1 else ()


def with_plain_layers(model: Any, dtype: torch.dtype) -> Any:
    """Replace each packed layer by the layer that it was before, as `model.dequantize` does. Changes the model.

    For merging QLoRA adapters: the weights are the values of the packed ones.
    """
    for path, module in list(model.named_modules()):
        weight = module._parameters.get("weight")
        if weight is not None and is_quantized(weight):
            model.set_submodule(path, _plain_layer(module, dequantized(module, weight).to(dtype)))
    model.is_quantized = False
    return model


def _plain_layer(module: Any, values: torch.Tensor) -> nn.Module:
    """A linear layer. transformers packs the transposed weight of a Conv1D."""
    outputs, inputs = values.shape
    is_transposed = issubclass(module.source_cls, Conv1D)
    with torch.device("meta"):
        plain: nn.Module = Conv1D(outputs, inputs) if is_transposed else nn.Linear(inputs, outputs)
    plain.weight = nn.Parameter(values.T.contiguous() if is_transposed else values, requires_grad=False)
    plain.bias = module.bias
    return plain
