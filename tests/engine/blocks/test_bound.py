"""A bound on a merge that is not made: where there is one, PEFT's merge lies within."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_gate.engine.blocks.bound import merged_bound
from merge_gate.engine.blocks.delta import LowRankUpdate
from tests.support.engine.blocks_layers import by_peft, factors, tuner_layer, update_of
from tests.support.properties import examples

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANKS = st.one_of(st.integers(1, 24), st.sampled_from([32, 33, 64, 65, 128, 256]))
SCALINGS = st.sampled_from([2.0, 1.0, 0.5, 16 / 3, 0.1, 32 / math.sqrt(12), -1.0, 3])


def bound_of(layer) -> float:
    weight = layer.get_base_layer().weight.detach()
    return merged_bound(float(weight.abs().max()), update_of(layer), weight.dtype)


@settings(max_examples=examples(250), deadline=None)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 80),
    rank=RANKS,
    scaling=SCALINGS,
    dtype=st.sampled_from(DTYPES),
    factor_dtype=st.sampled_from([torch.float32, torch.float64]),
    weight_size=st.sampled_from([0.0, 1e-30, 0.05, 3e4, 1e37]),
    size=st.sampled_from([1e-30, 0.1, 30.0, 200.0, 1e10, 1e18, 4e18]),
    constant=st.booleans(),
    safe=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
def test_no_merged_value_exceeds_a_finite_bound(
    rows, columns, rank, scaling, dtype, factor_dtype, weight_size, size, constant, safe, seed
) -> None:
    """The one promise of a bound: where it is finite, PEFT's merge is finite and lies within, in both of its orders."""
    layer = tuner_layer(
        "linear", rows, columns, rank, dtype=dtype, factor_dtype=factor_dtype, scaling=scaling, seed=seed
    )
    weight = layer.get_base_layer().weight.data
    largest = torch.finfo(dtype).max
    weight.copy_(torch.randn(weight.shape).mul(weight_size).clamp(-largest, largest))
    for factor in factors(layer):
        factor.data.fill_(size) if constant else factor.data.normal_(std=size)
    bound = bound_of(layer)
    if math.isfinite(bound):
        merged = by_peft(layer, safe=safe)[0].double()
        assert merged.isfinite().all()
        assert float(merged.abs().max()) <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 16, 256])
def test_the_bound_is_no_more_than_twice_what_can_happen(dtype, rank) -> None:
    """Equal values everywhere: every product has the same sign and the largest size."""
    layer = tuner_layer("linear", 70, 40, rank, dtype=dtype)
    layer.get_base_layer().weight.data.fill_(0.25)
    for factor in factors(layer):
        factor.data.fill_(0.5)
    bound = bound_of(layer)
    layer.merge(safe_merge=True)
    assert bound == pytest.approx(2 * layer.get_base_layer().weight.max().item(), rel=0.01)


@pytest.mark.parametrize(
    ("what", "weight", "a", "b", "scaling", "dtype"),
    [
        ("the product, which the scaling makes small again", 1.0, 1e20, 1e20, 1e-30, torch.float32),
        ("a partial sum", 1.0, 1e19, 1e19, 1.0, torch.float32),
        ("the scaled product", 1.0, 1.0, 1.0, 1e38, torch.bfloat16),
        ("the delta in float16", 1.0, 100.0, 100.0, 1.0, torch.float16),
        ("the sum in float16", 40000.0, 1.0, 1.0, 1.0, torch.float16),
        ("the scaling", 1.0, 1.0, 1.0, math.inf, torch.float32),
        ("the scaling, in float32", 1.0, 1e-3, 1e-3, 1e40, torch.float32),
        ("NaN in a factor", 1.0, math.nan, 1.0, 1.0, torch.float32),
        ("NaN times nothing", 1.0, math.nan, 0.0, 1.0, torch.float32),
        ("infinity in a factor", 1.0, 1.0, -math.inf, 1.0, torch.float32),
        ("NaN in the weight", math.nan, 1.0, 1.0, 1.0, torch.float32),
    ],
)
def test_where_a_step_could_overflow_there_is_no_bound(what, weight, a, b, scaling, dtype) -> None:
    lora_a, lora_b = torch.full((16, 8), 1e-3), torch.full((8, 16), 1e-3)
    lora_a[7, 3], lora_b[5, 7] = a, b
    assert merged_bound(weight, LowRankUpdate(lora_a=lora_a, lora_b=lora_b, scaling=scaling), dtype) == math.inf, what


def test_factors_whose_sums_a_device_may_round_to_half_have_no_bound() -> None:
    lora_a, lora_b = torch.ones(4, 8, dtype=torch.bfloat16), torch.ones(8, 4, dtype=torch.bfloat16)
    half = LowRankUpdate(lora_a=lora_a, lora_b=lora_b, scaling=1.0)
    single = LowRankUpdate(lora_a=lora_a.float(), lora_b=lora_b.float(), scaling=1.0)
    assert merged_bound(1.0, half, torch.bfloat16) == math.inf
    assert merged_bound(1.0, single, torch.bfloat16) == pytest.approx(10.0)


def test_a_dora_merge_divides_by_a_norm_and_has_no_bound() -> None:
    assert bound_of(tuner_layer("linear", 70, 40, 4, dora=True)) == math.inf
