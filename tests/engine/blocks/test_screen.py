"""What a float32 merge says of PEFT's: the bound holds for every element, and the extremes are those of all of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_gate.engine.blocks import screen
from merge_gate.engine.blocks.block_merge import measure_merge, merged_blocks
from merge_gate.engine.blocks.delta import Factors, LowRankUpdate
from merge_gate.engine.blocks.screen import Bound, Candidates
from merge_gate.engine.tensors.threads import Buffers
from tests.support.engine.blocks_layers import whole
from tests.support.engine.extremes import EXPONENTS, HALVES, update_of, visit, weight_of
from tests.support.properties import examples


@settings(max_examples=examples(100), deadline=None)
@given(
    rows=st.integers(2, 300),
    columns=st.integers(1, 90),
    rank=st.sampled_from([1, 2, 8, 16, 33, 256]),
    sizes=st.tuples(EXPONENTS, EXPONENTS, EXPONENTS, st.integers(-20, 20)),
    dtype=HALVES,
    factor_dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
    transposed=st.booleans(),
    in_bfloat16=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
def test_what_peft_rounds_is_within_reach_of_the_sum(
    rows, columns, rank, sizes, dtype, factor_dtype, transposed, in_bfloat16, seed
) -> None:
    """Every element, of weights and factors of all sizes: values that vanish in the dtype among them."""
    w, a, b, s = (2.0**size for size in sizes)
    made = update_of(
        rows, columns, rank, seed=seed, a_size=a, b_size=b, scaling=s, dtype=factor_dtype, transposed=transposed
    )
    weight = weight_of(made, w, dtype, seed)
    factors = Factors.of(made.lora_a, made.lora_b, transposed=transposed)
    in_bfloat16 = in_bfloat16 and dtype is torch.bfloat16
    if in_bfloat16:
        sums = torch.addmm(weight, (factors.left * s).bfloat16(), factors.right.bfloat16()).float()
    else:
        sums = torch.addmm(weight.float(), factors.left, factors.right, alpha=s)
    bound = Bound.of(factors, s, dtype, in_bfloat16=in_bfloat16)
    reach = None if bound is None else bound.reach((float(sums.min()), float(sums.max())))
    if reach is None:
        return
    peft = whole(merged_blocks(weight, made, Buffers(block_elements=1)))
    low, high = ((sums.double() + sign * reach).float().to(dtype) for sign in (-1, 1))
    assert bool(((low <= peft) & (peft <= high)).all())


@settings(max_examples=examples(80), deadline=None)
@given(
    rows=st.integers(512, 900),
    columns=st.integers(1, 40),
    rank=st.sampled_from([1, 8, 16]),
    sizes=st.tuples(st.integers(-8, 2), st.integers(-8, 2)),
    levels=st.sampled_from([0, 1, 2]),
    dtype=HALVES,
    transposed=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
@pytest.mark.parametrize("fast", [False, True])
def test_the_extremes_are_those_of_all_blocks(
    fast, rows, columns, rank, sizes, levels, dtype, transposed, seed
) -> None:
    """With `levels` the weight has one or two values only, so that blocks differ by the delta alone."""
    made = update_of(rows, columns, rank, seed=seed, a_size=2.0 ** sizes[0], b_size=2.0 ** sizes[1])
    if transposed:
        made = LowRankUpdate(lora_a=made.lora_b.T, lora_b=made.lora_a.T, scaling=2.0, transposed=True)
    weight = weight_of(made, 1.0, dtype, seed)
    if levels:
        weight = weight.sign() if levels > 1 else torch.ones_like(weight)
    buffers = Buffers(block_elements=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screen, "multiplies_bfloat16", lambda: fast)
        peft = whole(merged_blocks(weight, made, buffers))
        found = measure_merge(merged_blocks(weight, made, buffers))
    assert (found.minimum, found.maximum) == (peft.min().item(), peft.max().item())
    assert found.changed == (not torch.equal(peft, weight))
    assert found.numel == found.of == peft.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row", [0, 63, 64, 1999, 2047])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["weight", "lora_a", "lora_b"])
def test_nothing_is_left_out_where_a_value_is_not_finite(place, value, row, dtype) -> None:
    made = update_of(2048, 64, 8, seed=0)
    weight = weight_of(made, 1.0, dtype, 0)
    if place == "lora_a":
        made.lora_a[:, row % 64] = value
    else:
        (weight if place == "weight" else made.lora_b)[row, 0] = value
    merge = merged_blocks(weight, made, Buffers(block_elements=1))
    assert merge.candidates() is None
    assert not measure_merge(merge).finite


@pytest.mark.parametrize("size", [3e4, 6e4])
def test_nothing_is_left_out_near_the_largest_value(size) -> None:
    made = update_of(600, 64, 8, seed=0)
    weight = weight_of(made, 0.01, torch.float16, 0)
    weight[200, 3] = size
    merge = merged_blocks(weight, made, Buffers(block_elements=1))
    assert merge.candidates() is None
    assert measure_merge(merge).maximum == whole(merge).max().item()


def test_of_a_usual_weight_few_blocks_are_left() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) * 0.02 for shape in ((16, 512), (8192, 16)))
    made = LowRankUpdate(lora_a=a, lora_b=b, scaling=2.0)
    merge = merged_blocks(weight_of(made, 0.02, torch.bfloat16, 0), made, Buffers(block_elements=1))
    visited = visit(merge)
    assert len(merge.slices) == 128
    assert len(visited) < 16


def test_all_blocks_are_visited_if_one_holds_what_is_excluded() -> None:
    """As where a library rounds the factors to fewer bits: the figures do not rest on that it does not."""
    ends = tuple((-1.0, float(number)) for number in range(1, 10))
    seen: list[int] = []

    def merged(number: int) -> tuple[float, float]:
        seen.append(number)
        return -1.0, ends[number][1] + 0.5

    Candidates(ends, [0.25] * 9, float).visit(merged)
    assert sorted(seen) == list(range(9))


def test_blocks_with_alike_greatest_values_are_asked_once() -> None:
    ends, seen = ((-1.0, 1.0), (-1.0, 1.1), (-1.2, 0.9)), []

    def merged(number: int) -> tuple[float, float]:
        seen.append(number)
        return float(round(ends[number][0])), float(round(ends[number][1]))

    Candidates(ends, [0.1] * 3, lambda value: float(round(value))).visit(merged)
    assert seen == [1, 2]
