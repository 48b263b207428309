"""Quantized bases, in two tables: how to load each kind, and how to get the values of each kind of packed weight.

In: a word of `Quantization`, or a module and its weight. Out: options for transformers; plain tensors to measure. A
packed integer is always finite, but its scale can be NaN, which shows only in the values. Knows no PEFT.

Values become 4 bits on a CPU with the bits of bitsandbytes, in a quarter of its time:

1. Scale the values as bitsandbytes does (backends/default/ops.py, `quantize_4bit`).
2. A code is the number of bounds below the scaled value. bitsandbytes finds it by bisection, in whole weights. Here
   each of the 15 bounds is compared with all values of a block in cache, and the results are added. That is exact.
3. bitsandbytes cross-checks this: once per process on values of all sizes and on the bounds themselves, and on the
   first values of every weight of a base.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoQuantizationConfig

from merge_gate.engine.tensors.measure import dtype_name
from merge_gate.engine.tensors.threads import spread
from merge_gate.records.terms import Quantization

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
def own_quantize_4bit() -> Any:
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
    counted = _counted(values, blocksize, quant_type)
    packed, state = own_quantize_4bit()(values, blocksize=blocksize, quant_type=quant_type)
    return counted is not None and torch.equal(counted[0], packed) and torch.equal(counted[1], state.absmax)


# --- a base that is quantized while it loads -----------------------------------------------------------------------


@contextmanager
def loading_in_blocks() -> Iterator[None]:
    """Inside of this context, the layers of bitsandbytes are quantized in blocks, on all cores."""
    own = own_quantize_4bit()

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
    results = list(spread(lambda block: quantized(block, sharing, quant_type), blocks))
    made = [result for result in results if result is not None]
    if len(made) < len(results):
        return None
    packed, state = own_quantize_4bit()(blocks[0][:CROSS_CHECKED], blocksize=sharing, quant_type=quant_type)
    ours = made[0][0][: len(packed)], made[0][1][: len(state.absmax)]
    if not (torch.equal(ours[0], packed) and torch.equal(ours[1], state.absmax)):
        return None
    state.absmax, state.shape = torch.cat([scales for _, scales in made]), weight.shape
    return torch.cat([packed for packed, _ in made]), state


BNB_4BIT = "Params4bit"
BNB_8BIT = "Int8Params"

QUANTIZED_AS = {BNB_4BIT: Quantization.BNB_4BIT, BNB_8BIT: Quantization.BNB_8BIT}
"""The packing of a parameter by its class."""


# --- loading -------------------------------------------------------------------------------------------------------


def _bnb_8bit(_compute: torch.dtype) -> Any:
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


def _bnb_4bit(compute: torch.dtype) -> Any:
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


LOADED_BY: Mapping[Quantization, Callable[[torch.dtype], Any]] = MappingProxyType(
    {Quantization.BNB_8BIT: _bnb_8bit, Quantization.BNB_4BIT: _bnb_4bit}
)
"""The configuration of transformers that quantizes a base while it loads, by the dtype to compute in."""


def loading_options(quantization: Quantization, dtype: str, device: str) -> dict[str, Any]:
    """What `from_pretrained` needs to quantize the base. `dtype` is the one asked for, or `auto`."""
    if quantization is Quantization.NONE:
        return {}
    compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    return {"quantization_config": LOADED_BY[quantization](compute), "device_map": {"": device}}


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
    return loading_in_blocks() if quantization is Quantization.BNB_4BIT else nullcontext()


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
    values: torch.Tensor = bnb().dequantize_4bit(weight.data, weight.quant_state)
    return values


def _int4_scales(_module: nn.Module, weight: Any) -> list[tuple[str, torch.Tensor]]:
    state = weight.quant_state
    named = [("absmax", state.absmax), ("quant_map", state.code)]
    if state.nested:
        named += [("nested_absmax", state.state2.absmax), ("nested_quant_map", state.state2.code)]
        named.append(("nested_offset", state.offset))
    return [(name, tensor) for name, tensor in named if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()]


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
    scale = row_scales(module, weight)
    if scale is None:
        return torch.full(tuple(weight.shape), torch.nan)  # a weight without its scales stands for nothing
    rows: torch.Tensor = bnb().int8_vectorwise_dequant(weight.data, scale.to(weight.device))
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
    packing = PACKINGS.get(type(tensor).__name__)
    return packing if packing is not None and packing.holds_integers(tensor) else None


def is_quantized(tensor: torch.Tensor) -> bool:
    """Whether this is a parameter that holds packed integers."""
    return _packing(tensor) is not None


def elements(tensor: torch.Tensor) -> int:
    """The number of values in a tensor, after unpacking."""
    packing = _packing(tensor)
    return tensor.numel() if packing is None else packing.elements(tensor)


def dequantized(module: nn.Module, weight: Any) -> torch.Tensor:
    """The dequantized values of a weight, in the shape of the layer (out_features, in_features)."""
    return PACKINGS[type(weight).__name__].values(module, weight)


def scales(module: nn.Module, weight: Any) -> list[tuple[str, torch.Tensor]]:
    """(suffix, tensor) for every scale that the weight's values depend on."""
    return PACKINGS[type(weight).__name__].scales(module, weight)


def with_scales(module: nn.Module, tensor: torch.Tensor) -> list[torch.Tensor]:
    """A tensor, and the scales that its values depend on if it is quantized."""
    return [tensor.data, *(scale for _, scale in scales(module, tensor))] if is_quantized(tensor) else [tensor.data]


def has_layers_in(module: str, weight: Any) -> bool:
    """Whether a module of PEFT, given by name, has layers for this kind of weight."""
    return module.rpartition(".")[2] == PACKINGS[type(weight).__name__].layers


def packings(model: Any) -> set[Quantization]:
    """The packings of the parameters of a model."""
    return {QUANTIZED_AS[type(parameter).__name__] for parameter in model.parameters() if is_quantized(parameter)}


def main_dtype(model: Any) -> torch.dtype:
    """The dtype of most of the parameters of floating point; for a packed model, the dtype of the unpacked weights."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if is_quantized(parameter):
            sizes[getattr(state, "dtype", None) or model.dtype] += elements(parameter)
        elif parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    if not sizes:
        fallback: torch.dtype = getattr(model, "dtype", torch.float32)
        return fallback
    return sizes.most_common(1)[0][0]


def loaded_dtypes(tensors: Iterable[torch.Tensor]) -> tuple[tuple[str, float], ...]:
    """How many values of parameters have which dtype, the most first; empty if all have the same."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if isinstance(tensor, torch.nn.Parameter) or is_quantized(tensor):
            name = str(QUANTIZED_AS[type(tensor).__name__]) if is_quantized(tensor) else dtype_name(tensor.dtype)
            sizes[name] += elements(tensor)
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
