"""How much of a delta is only rounding: the delta that an untrained adapter of the method has.

In: a tuner layer before its merge, with the weight below it. Out: a share of that weight's norm. Knows the untrained
tensors of each method, and nothing of merges.
"""

# The delta of an untrained adapter is often not zero. PEFT makes its tensors in float32 and rounds them to the base's
# 16 bits, so terms that should cancel leave their roundings. The spacing of the numbers gives their size: the error of
# a rounded value is uniform over one step, with variance step² / 12. An untrained adapter has a delta of at most that
# size. A trained adapter has a larger one, or its values lie between the 16-bit numbers.

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners import lora
from peft.utils.other import transpose

from merge_gate.engine.adapter.load_adapter import ADAPTER_NAME, factors_of
from merge_gate.engine.blocks.delta import LowRankUpdate
from merge_gate.engine.merge.merged_tensors import ROUNDING_SHARE
from merge_gate.engine.tensors.measure import same_values

DENSE = (lora.layer.Linear, lora.layer.Embedding)
PACKED = tuple(getattr(lora, name) for name in ("Linear8bitLt", "Linear4bit") if hasattr(lora, name))
"""PEFT's layers for bitsandbytes weights. There are none if bitsandbytes is not installed."""

UNTRAINED_MAGNITUDE = 2.0**-8
"""How far an untrained DoRA magnitude can be from the norm of its row, by the rounding of a 16-bit base."""

ADDED = (
    "lora_", "hada_", "lokr_", "vblora_", "vera_lambda_", "randlora_", "fourierft_", "c3a_", "shira_", "waveft_",
    "hira_", "adamss_", "unilora_", "peanut_", "gralora_", "tinylora_", "delora_", "pvera_lambda_", "supertuning_",
    "glora_", "beft_", "ia3_", "miss_", "trainable_tokens_",
)  # fmt: skip
"""Prefixes of tensors that, while untrained, leave a weight as it is, to the last bit: a factor is 0, or 1 for IA3.

Methods that rotate or decompose the weight are not here, because that rounds in any case."""

ADDING = tuple(
    getattr(lora.variants, name)
    for name in (
        "VeloraLinearVariant", "BdLoraLinearVariant", "MontecloraLinearVariant", "MiCALinearVariant",
        "MiCAEmbeddingVariant",
    )
    if hasattr(lora.variants, name)
)  # fmt: skip
"""Variants of LoRA whose merge is W + delta, like LoRA's own."""

MOST_ROUNDING = 2.0**-10
"""For independent ranks k, ‖B @ A‖² is Σ ‖a_k‖² ‖b_k‖². If they cancel, rounding leaves 4e-5 of it."""

HALVES = (torch.bfloat16, torch.float16)

MARGIN = 2.0
"""Factor on the expected norm of the rounding to 16 bits. The most of 105 untrained adapters was 1.21."""

COMPUTED = 2 * 2.0**-23
"""‖B @ A‖ of an untrained adapter that was not rounded, as a share of ‖A‖ ‖B‖: the rounding of float32. The most of 228
untrained adapters was 1.6 * 2⁻²³. Two adapters of a combination that cancel to a millionth leave more."""


def rounding_share(layer: Any, start: tuple[torch.Tensor, ...] | None = None) -> float:
    """How large a share of the weight a delta can be by rounding alone. It is more for DoRA while its product is zero.

    `start` has the factors that PEFT took off the weight, so that training began without a delta
    (`Loaded.initial_factors`). While they are untrained, a merge changes the weight only by rounding.
    """
    if ADAPTER_NAME in (getattr(layer, "lora_magnitude_vector", None) or ()):
        factors = factors_of(layer)
        trained = factors is None or (all(bool(factor.any()) for factor in factors) and not _is_lora_start(factors))
        return ROUNDING_SHARE if trained else UNTRAINED_MAGNITUDE
    variant = (getattr(layer, "lora_variant", None) or {}).get(ADAPTER_NAME)
    if not all(name.startswith(ADDED) for name in layer.adapter_layer_names):
        return math.inf if _is_decomposed_alone(layer, start) else ROUNDING_SHARE
    if start is not None:
        return math.inf if _is_still(layer, *start) else ROUNDING_SHARE
    if variant is not None:
        return 0.0 if type(variant) in ADDING else ROUNDING_SHARE
    return math.inf if _cancels(layer) else 0.0


# --- LoRA ----------------------------------------------------------------------------------------------------------


def is_start(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether B @ A is only the rounding of orthogonal factors, which cancel (`init_lora_weights: orthogonal`).

    Args:
        a: (r, in), as PEFT holds it after loading.
        b: (out, r), as PEFT holds it after loading.
    """
    a, b = a.detach().float(), b.detach().float()
    left, right = b.T @ b, a @ a.T
    square, parts = float((left * right).sum()), float((left.diagonal() * right.diagonal()).sum())
    if not square <= MOST_ROUNDING * parts < math.inf or parts == 0.0:  # true for all trained factors
        return False
    a, b = a.double(), b.double()
    left, right = b.T @ b, a @ a.T
    grid, most = _grid(a, b), COMPUTED**2 * float(left.trace() * right.trace())
    if grid is not None:
        noise = left.diagonal() * _variance(a, grid).sum(1) + _variance(b, grid).sum(0) * right.diagonal()
        most += MARGIN**2 * float(noise.sum())
    return float((left * right).sum()) <= most


def _is_lora_start(factors: tuple[torch.Tensor, torch.Tensor]) -> bool:
    a, b = (factor.flatten(1) for factor in factors)
    return is_start(a, b)


def _cancels(layer: Any) -> bool:
    """Whether the product of a LoRA's factors is zero except for rounding. A convolution has flattened factors."""
    factors = factors_of(layer) if issubclass(type(layer), (*DENSE, *PACKED, lora.layer._ConvNd)) else None
    if factors is None:
        return False
    a, b = (factor.flatten(1) for factor in factors)
    return LowRankUpdate(lora_a=a, lora_b=b, scaling=1.0).delta_norms()[0] == 0 or is_start(a, b)


def _is_still(layer: Any, first_a: torch.Tensor, first_b: torch.Tensor) -> bool:
    """Whether the product of a LoRA's factors is the untrained one."""
    factors = factors_of(layer)
    if factors is None or first_a.dim() != 2:  # noqa: PLR2004
        return False
    apart = LowRankUpdate(
        lora_a=torch.cat((factors[0], first_a.to(factors[0]))),
        lora_b=torch.cat((factors[1], -first_b.to(factors[1])), dim=1),
        scaling=1.0,
    )
    first = LowRankUpdate(lora_a=first_a, lora_b=first_b, scaling=1.0)
    return apart.delta_norms()[0] <= ROUNDING_SHARE * first.delta_norms()[0]


# --- methods that take the weight apart and put it together again --------------------------------------------------


def _is_decomposed_alone(layer: Any, start: tuple[torch.Tensor, ...] | None) -> bool:
    """Whether the tensors of FRoD or DEFT are still the ones that they decomposed the weight into."""
    if "frod_lambda_l" in layer.adapter_layer_names and start is not None:
        sparse, lengths = layer.frod_lambda_s_values[ADAPTER_NAME], layer.frod_lambda_l[ADAPTER_NAME]
        return not bool(sparse.any()) and same_values(lengths.detach(), start[0].to(lengths))
    return ADAPTER_NAME in getattr(layer, "deft_R", ()) and _is_deft_start(layer)


def _is_deft_start(layer: Any) -> bool:
    """Whether DEFT's R is untrained: `right.T @ W`, except for the rounding of R and P (peft/tuners/deft)."""
    held_p, held_r = layer.deft_P[ADAPTER_NAME].detach(), layer.deft_R[ADAPTER_NAME].detach()
    grid = _grid(held_p, held_r)
    if grid is None:  # in float32 the rest is below the share of every method
        return False
    scaling = layer.deft_scaling[ADAPTER_NAME]
    weight = transpose(layer.get_base_layer().weight.detach().float(), layer.fan_in_fan_out)
    generator = torch.Generator().manual_seed(0)
    offsets = [
        (torch.rand(matrix.shape, generator=generator).double() - 0.5).to(matrix.device) for matrix in (held_p, held_r)
    ]
    moved_p = (held_p.double() + offsets[0] * _step(held_p, grid)).float()
    right, moved = (layer._project(matrix, ADAPTER_NAME)[1] for matrix in (held_p, moved_p))
    left = held_r.float() * scaling - right.T @ weight
    rounding = (moved - right).T @ weight + (offsets[1] * _step(held_r, grid)).float() * scaling
    return float(left.norm()) <= MARGIN * float(rounding.norm())


# --- numbers -------------------------------------------------------------------------------------------------------


def _grid(*tensors: torch.Tensor) -> torch.dtype | None:
    """The 16-bit dtype that holds all values exactly; None if neither does."""
    for dtype in HALVES:
        if all(bool((tensor.detach().to(dtype).to(tensor.dtype) == tensor).all()) for tensor in tensors):
            return dtype
    return None


def _step(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance from each value to the next one of this dtype, float64."""
    info = torch.finfo(dtype)
    mantissa, exponent = torch.frexp(tensor.detach().double().abs().clamp_min(info.tiny))
    return torch.ldexp(torch.ones_like(mantissa), exponent - 1) * info.eps


def _variance(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return _step(tensor, dtype).square() / 12
