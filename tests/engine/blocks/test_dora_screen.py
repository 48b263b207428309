"""What the sums say of PEFT's DoRA merge: no value exceeds the bound of its row, and the extremes are those of all."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_gate.engine.blocks import screen
from merge_gate.engine.blocks.block_merge import measure_merge, merged_blocks
from merge_gate.engine.blocks.delta import Factors, LowRankUpdate
from merge_gate.engine.blocks.screen import DoraBound, DoraScreen, norms_are_summed_in_float32, summed
from merge_gate.engine.tensors.threads import Buffers
from tests.support.engine.blocks_layers import whole
from tests.support.engine.extremes import EXPONENTS, HALVES, update_of, visit, weight_of
from tests.support.properties import examples


def dora_of(
    update: LowRankUpdate, weight: torch.Tensor, *, size: float, seed: int, share: float = 0.0
) -> LowRankUpdate:
    """Magnitudes around the lengths of the rows, times `size`; a `share` of them is zero, another one negative."""
    generator = torch.Generator().manual_seed(seed + 2)
    lengths = (weight.float() + update.scaling * update.lora_b @ update.lora_a).norm(dim=1)
    noise = 1 + 0.1 * torch.randn(len(lengths), generator=generator)
    chosen = torch.rand(len(lengths), generator=generator)
    signs = torch.where(chosen < share, 0.0, torch.where(chosen < 2 * share, -1.0, 1.0))
    return replace(update, magnitude=lengths * noise * signs * size)


@settings(max_examples=examples(120), deadline=None)
@given(
    rows=st.integers(1, 200),
    columns=st.integers(1, 90),
    rank=st.sampled_from([1, 2, 8, 16, 33, 256]),
    sizes=st.tuples(EXPONENTS, EXPONENTS, EXPONENTS, st.integers(-20, 20), EXPONENTS),
    dtype=HALVES,
    in_bfloat16=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
def test_no_value_exceeds_the_bound_of_its_row(rows, columns, rank, sizes, dtype, in_bfloat16, seed) -> None:
    """Every element, before it is rounded, of weights, factors and magnitudes of all sizes."""
    w, a, b, s, m = (2.0**size for size in sizes)
    plain = update_of(rows, columns, rank, seed=seed, a_size=a, b_size=b, scaling=s)
    weight = weight_of(plain, w, dtype, seed)
    made = dora_of(plain, weight, size=m, seed=seed, share=0.1)
    in_bfloat16 = in_bfloat16 and dtype is torch.bfloat16
    found = DoraBound.of(made, dtype, in_bfloat16=in_bfloat16)
    if found is None:
        return
    factors, every = Factors.of(made.lora_a, made.lora_b, transposed=False), slice(0, rows)
    ((_, sums),) = summed(weight, factors, s, [every], Buffers(), in_bfloat16=in_bfloat16)
    largest = found.largest(every, sums.abs().amax(1), torch.linalg.vector_norm(sums, dim=1))
    if largest is None:
        return
    summed_by_peft = weight.float() + made.lora_b @ made.lora_a * made.scaling
    merged = (made.magnitude / torch.linalg.norm(summed_by_peft, dim=1)).view(-1, 1) * summed_by_peft
    assert bool((merged.double().abs().amax(1) <= largest).all())


@settings(max_examples=examples(80), deadline=None)
@given(
    rows=st.integers(512, 900),
    columns=st.integers(1, 40),
    rank=st.sampled_from([1, 8, 16]),
    sizes=st.tuples(st.integers(-8, 2), st.integers(-8, 2), st.integers(-12, 4)),
    levels=st.sampled_from([0, 1, 2]),
    share=st.sampled_from([0.0, 0.1]),
    dtype=HALVES,
    seed=st.integers(0, 1 << 16),
)
@pytest.mark.parametrize("fast", [False, True])
def test_the_extremes_are_those_of_all_blocks(fast, rows, columns, rank, sizes, levels, share, dtype, seed) -> None:
    """With `levels` the weight has one or two values only. Some magnitudes are zero or negative."""
    plain = update_of(rows, columns, rank, seed=seed, a_size=2.0 ** sizes[0], b_size=2.0 ** sizes[1])
    weight = weight_of(plain, 1.0, dtype, seed)
    if levels:
        weight = weight.sign() if levels > 1 else torch.ones_like(weight)
    made = dora_of(plain, weight, size=2.0 ** sizes[2], seed=seed, share=share)
    buffers = Buffers(block_elements=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screen, "multiplies_bfloat16", lambda: fast)
        peft = whole(merged_blocks(weight, made, buffers))
        found = measure_merge(merged_blocks(weight, made, buffers))
    assert (found.minimum, found.maximum) == (peft.min().item(), peft.max().item())
    assert found.changed == (not torch.equal(peft, weight))
    assert found.numel == found.of == peft.numel()


def usual(dtype: torch.dtype = torch.bfloat16, rows: int = 2048) -> tuple[torch.Tensor, LowRankUpdate]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) * 0.02 for shape in ((16, 512), (rows, 16)))
    plain = LowRankUpdate(lora_a=a, lora_b=b, scaling=2.0)
    weight = weight_of(plain, 0.02, dtype, 0)
    return weight, dora_of(plain, weight, size=1.0, seed=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row", [0, 63, 64, 1999, 2047])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["weight", "lora_a", "lora_b", "magnitude"])
def test_nothing_is_left_out_where_a_value_is_not_finite(place, value, row, dtype) -> None:
    weight, made = usual(dtype)
    (weight if place == "weight" else getattr(made, place)).view(-1)[row] = value
    merge = merged_blocks(weight, made, Buffers(block_elements=1))
    assert merge.candidates() is None
    assert not math.isfinite(measure_merge(merge).maximum) or place == "weight"  # an infinite norm makes zeros


def test_nothing_is_left_out_where_a_norm_vanishes() -> None:
    """PEFT divides zero by zero there."""
    weight, made = usual()
    weight[700], made.lora_b[700] = 0.0, 0.0
    merge = merged_blocks(weight, made, Buffers(block_elements=1))
    assert merge.candidates() is None
    assert math.isnan(measure_merge(merge).maximum)


@pytest.mark.parametrize("row", [3, 1500])
@pytest.mark.parametrize("size", [4e5, 1e6, 1e38])
def test_nothing_is_left_out_near_the_largest_value(size, row) -> None:
    weight, made = usual(torch.float16)
    assert made.magnitude is not None
    made.magnitude[row] *= size
    merge = merged_blocks(weight, made, Buffers(block_elements=1))
    assert merge.candidates() is None
    assert measure_merge(merge).maximum == whole(merge).max().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_a_usual_weight_few_blocks_are_left(dtype) -> None:
    weight, made = usual(dtype, rows=8192)
    merge = merged_blocks(weight, made, Buffers(block_elements=1))
    assert len(merge.slices) == 128
    assert len(visit(merge)) < 24


def test_norms_not_summed_in_float32_are_not_in_bfloat16(monkeypatch) -> None:
    assert norms_are_summed_in_float32()
    monkeypatch.setattr(screen, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(screen, "norms_are_summed_in_float32", lambda: False)
    weight, made = usual()
    found = DoraScreen(weight, made, [slice(0, len(weight))], Buffers())
    assert found._rows().dtype is torch.float32
