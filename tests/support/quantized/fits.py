"""A tensor that is measured as its rows pass, in blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from merge_gate.features.quantized.measurement import TensorStrength
from merge_gate.features.quantized.tensor_fit import TensorFit


def fitted(
    outline: TensorStrength,
    base: torch.Tensor,
    merged: torch.Tensor,
    actual: torch.Tensor,
    dtype: torch.dtype,
    requantized: Callable[[torch.Tensor], torch.Tensor] | None = None,
    block: int = 48,
) -> TensorStrength:
    """The figures of a tensor, from W, W + D, and Q. `requantized` quantizes any rows; so many come at once."""
    again = None if requantized is None else lambda values, _rows: requantized(values)
    fit = TensorFit(outline, base.shape, dtype, again)
    for start in range(0, len(base), block):
        rows = slice(start, start + block)
        own = base[rows]
        fit.add(own, own if merged is base else merged[rows], actual[rows], rows)
    return fit.facts()
