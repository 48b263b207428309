"""The figures of one merged tensor, compared with the base: merged tensor + base → `TensorMerge`.

In: a merged tensor, the base, and the exact sum if it is known. Out: numbers. Knows nothing of PEFT or of layers;
judges nothing.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from merge_gate.engine.base.loaded_base import Base, measure_in
from merge_gate.engine.tensors.measure import distance, dtype_max, same_bits, same_values, unchanged_fraction
from merge_gate.engine.tensors.quantized import dequantized, is_quantized
from merge_gate.records.measured import TensorMerge

ROUNDED = (torch.bfloat16, torch.float16)
"""Dtypes in which a float32 delta loses bits. The loss is measured for these."""

ROUNDING_SHARE = 2.0**-20
"""A delta below this share of the weight is rounding in float32: 2⁻²⁴ for each of a few steps."""


def of_tensor(
    base: Base,
    module: nn.Module,
    name: str,
    tensor: torch.Tensor,
    exact: torch.Tensor | None = None,
    *,
    rounding_share: float = ROUNDING_SHARE,
) -> TensorMerge:
    """Measure a merged tensor, and compare it with the base's of that name.

    Args:
        base: the loaded base.
        module: the module of the merged model that holds the tensor.
        name: the tensor's name in the base and in the merged model.
        tensor: the merged tensor in its final form.
        exact: W + delta before it was rounded to the final dtype, float32. The loss is measured against it.
        rounding_share: a delta that is at most this share of the weight is only rounding.
    """
    with base.filled([base.first_name(name)]):
        return _compared(base, module, name, tensor, exact, rounding_share=rounding_share)


def _compared(
    base: Base,
    module: nn.Module,
    name: str,
    tensor: torch.Tensor,
    exact: torch.Tensor | None,
    *,
    rounding_share: float,
) -> TensorMerge:
    place = name.rpartition(".")[0]
    if is_the_bases(base, name, tensor):
        stats = replace(base.figures(base.first_name(name)), name=name)
        return TensorMerge(module=place, stats=stats, dtype_max=dtype_max(tensor.dtype), changed=False)
    stats, *scales = measure_in(module, tensor, name)
    broken = next((scale for scale in scales if not scale.finite), None)
    if stats.finite and broken is not None:
        stats = broken
    values = dequantized(module, tensor) if is_quantized(tensor) else tensor.data
    ceiling = dtype_max(values.dtype)
    known = base.tensors.get(base.first_name(name))
    if (
        known is None
        or known.shape != tensor.shape
        or not (stats.finite and base.figures(base.first_name(name)).finite)
    ):
        return TensorMerge(module=place, stats=stats, dtype_max=ceiling, changed=True)
    was = (dequantized(base.model.get_submodule(place), known) if is_quantized(known) else known.data).to(values.device)
    base_norm = distance(was)
    delta_norm = distance(exact if exact is not None else values, was)
    comparable = was.dtype == values.dtype
    return TensorMerge(
        module=place,
        stats=stats,
        dtype_max=ceiling,
        changed=not (comparable and same_values(was, values)) and delta_norm > rounding_share * base_norm,
        base_norm=base_norm,
        delta_norm=delta_norm,
        lost_norm=None if exact is None else distance(values, exact),
        unchanged_fraction=unchanged_fraction(was, values) if comparable else None,
    )


def is_the_bases(base: Base, name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor has the bits of the base's tensor with this name."""
    known = base.tensors.get(base.first_name(name))
    if known is None or type(known) is not type(tensor) or is_quantized(tensor):
        return False
    with base.filled([base.first_name(name)]):
        return same_bits(known, tensor.to(known.device))


def shares_storage(known: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether a tensor is the base's own memory."""
    return known.data_ptr() == tensor.data_ptr() and known.shape == tensor.shape and known.dtype == tensor.dtype
