"""How the values of one tensor deviate from the expected ones, in units of the last place and by least squares.

In: actual, expected, and base values. Out: `Deviation`. Works in blocks of bounded size. Knows nothing of models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from merge_gate.engine.tensors.measure import CHUNK_ELEMENTS

BLOCK = 64
"""Values that share a scale in 4 bits, as transformers loads a base."""

LEAST_EXPLAINED = 0.5
"""A quantization explains a difference if it explains at least half of it: its scales may be quantized too."""


_EXPONENTS = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}
"""The integers of the size of a floating dtype, and the bits of the exponent in them."""


@dataclass(slots=True)
class Deviation:
    """See `TensorComparison`, which has the same figures."""

    changed: int = 0
    units: float = 0.0
    delta_sq: float = 0.0
    cross: float = 0.0
    actual_sq: float = 0.0
    rounding_sq: float = 0.0
    nonfinite: int = 0


def deviation(actual: torch.Tensor, expected: torch.Tensor, base: torch.Tensor | None) -> Deviation:
    """Compare three tensors of one shape. Without a base, its values are taken as zeros."""
    result = Deviation()
    if actual.dtype not in _EXPONENTS or expected.dtype not in _EXPONENTS:
        return result
    coarse = max((actual.dtype, expected.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    wide = torch.float64 if {torch.float32, torch.float64} & {actual.dtype, expected.dtype} else torch.float32
    flat = [None if one is None else one.detach().reshape(-1) for one in (actual, expected, base)]
    for start in range(0, actual.numel(), CHUNK_ELEMENTS):
        _add(result, [None if one is None else one[start : start + CHUNK_ELEMENTS].to(wide) for one in flat], coarse)
    return result


def _add(result: Deviation, values: list[torch.Tensor | None], dtype: torch.dtype) -> None:
    actual, expected, base = values
    assert actual is not None  # noqa: S101 - only the base may be absent
    assert expected is not None  # noqa: S101 - as above
    base = torch.zeros_like(expected) if base is None else base
    is_finite = torch.isfinite(actual)
    comparable = is_finite & torch.isfinite(expected) & torch.isfinite(base)
    result.nonfinite += int((~is_finite & torch.isfinite(expected)).sum())
    if bool((is_finite & ~torch.isfinite(expected)).any()):
        result.units = math.inf
    if not bool(comparable.all()):
        actual, expected, base = (torch.where(comparable, one, 0.0) for one in (actual, expected, base))
    unit = units(torch.maximum(base.abs(), expected.abs()), dtype)
    delta, moved = (expected - base).double(), (actual - base).double()
    result.changed += int(torch.count_nonzero(delta))
    result.units = max(result.units, float(((actual - expected).abs() / unit).max())) if len(unit) else result.units
    result.delta_sq += float(delta.dot(delta))
    result.cross += float(delta.dot(moved))
    result.actual_sq += float(moved.dot(moved))
    result.rounding_sq += float(torch.linalg.vector_norm(unit, dtype=torch.float64)) ** 2


def units(magnitude: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The unit of the last place of each of these values in a floating dtype."""
    limits = torch.finfo(dtype)
    bits, exponent = _EXPONENTS[dtype]
    power = (magnitude.to(dtype).view(bits) & exponent).view(dtype)  # without the mantissa: a power of two
    unit = power.to(magnitude.dtype) * limits.eps
    return unit.clamp(min=max(limits.smallest_normal * limits.eps, torch.finfo(magnitude.dtype).tiny))


def requantized(actual: torch.Tensor, expected: torch.Tensor, base: torch.Tensor) -> tuple[str, float] | None:
    """The quantization of the base that explains `actual - expected` best, and the share that it explains.

    None if none explains enough, if the tensor is no matrix, or if bitsandbytes is absent.
    """
    if base.dim() != 2 or base.numel() % BLOCK or not base.is_floating_point():  # noqa: PLR2004 - a matrix
        return None
    try:
        from bitsandbytes import functional  # noqa: PLC0415 - only for a difference without another explanation
    except ImportError:
        return None
    wide = base.detach().to(torch.float32)
    difference = actual.detach().to(torch.float32) - expected.detach().to(torch.float32)
    whole = float(difference.double().square().sum())
    shares = {}
    for kind in ("nf4", "fp4"):
        packed, state = functional.quantize_4bit(wide, blocksize=BLOCK, quant_type=kind)
        step = functional.dequantize_4bit(packed, state).to(torch.float32) - wide
        shares[f"bnb-4bit {kind}"] = 1 - _ratio(float((difference - step).double().square().sum()), whole)
    scale = wide.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    step = (wide / scale).round() * scale - wide
    shares["bnb-8bit"] = 1 - _ratio(float((difference - step).double().square().sum()), whole)
    best = max(shares, key=shares.__getitem__)
    return (best, shares[best]) if shares[best] >= LEAST_EXPLAINED else None


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0
