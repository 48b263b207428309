"""What sums say of PEFT's merges: no value is beyond its bound, and the extremes are those of all blocks."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_gate.engine.blocks import screen
from merge_gate.engine.blocks.block_merge import measure_merge, merged_blocks
from merge_gate.engine.blocks.delta import Factors, LowRankUpdate
from merge_gate.engine.blocks.screen import (
    Bound,
    Candidates,
    DoraBound,
    DoraScreen,
    norms_are_summed_in_float32,
    summed,
)
from merge_gate.engine.tensors.threads import Buffers
from tests.support.engine.blocks_layers import whole
from tests.support.properties import examples

HALVES = st.sampled_from([torch.bfloat16, torch.float16])
EXPONENTS = st.integers(-30, 12)


def update_of(rows, columns, rank, *, seed, b_size=0.1, a_size=0.1, scaling=2.0, dtype=torch.float32, transposed=False):
    """Factors of any size, with rows, columns and single values that stand out."""
    generator = torch.Generator().manual_seed(seed)
    lora_b = torch.randn(rows, rank, generator=generator)
    lora_a = torch.randn(rank, columns, generator=generator)
    lora_b *= 10 ** torch.randn(rows, 1, generator=generator).clamp(-2, 1)
    lora_a *= 10 ** torch.randn(1, columns, generator=generator).clamp(-2, 1)
    a, b = lora_a.mul(a_size).to(dtype), lora_b.mul(b_size).to(dtype)
    return LowRankUpdate(lora_a=a, lora_b=b, scaling=scaling, transposed=transposed)


def weight_of(update, size, dtype, seed):
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(update.shape, generator=generator).mul(size).to(dtype)


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


def usual(dora: bool, dtype: torch.dtype = torch.bfloat16, rows: int = 2048) -> tuple[torch.Tensor, LowRankUpdate]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) * 0.02 for shape in ((16, 512), (rows, 16)))
    plain = LowRankUpdate(lora_a=a, lora_b=b, scaling=2.0)
    weight = weight_of(plain, 0.02, dtype, 0)
    return weight, dora_of(plain, weight, size=1.0, seed=0) if dora else plain


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
def test_no_value_of_dora_exceeds_the_bound_of_its_row(rows, columns, rank, sizes, dtype, in_bfloat16, seed) -> None:
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
    transposed=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_the_extremes_are_those_of_all_blocks(
    dora, fast, rows, columns, rank, sizes, levels, share, dtype, transposed, seed
) -> None:
    """With `levels` the weight has one or two values only, so that blocks differ by the delta alone."""
    made = update_of(rows, columns, rank, seed=seed, a_size=2.0 ** sizes[0], b_size=2.0 ** sizes[1])
    if transposed and not dora:
        made = LowRankUpdate(lora_a=made.lora_b.T, lora_b=made.lora_a.T, scaling=2.0, transposed=True)
    weight = weight_of(made, 1.0, dtype, seed)
    if levels:
        weight = weight.sign() if levels > 1 else torch.ones_like(weight)
    if dora:
        made = dora_of(made, weight, size=2.0 ** sizes[2], seed=seed, share=share)
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
@pytest.mark.parametrize(
    ("place", "dora"),
    [*((place, dora) for place in ("weight", "lora_a", "lora_b") for dora in (False, True)), ("magnitude", True)],
)
def test_nothing_is_left_out_where_a_value_is_not_finite(place, dora, value, row, dtype) -> None:
    weight, made = usual(dora, dtype)
    (weight if place == "weight" else getattr(made, place)).view(-1)[row] = value
    merge = merged_blocks(weight, made, Buffers(block_elements=1))
    assert merge.candidates() is None
    found = measure_merge(merge)
    if dora:
        assert not math.isfinite(found.maximum) or place == "weight"  # an infinite norm makes zeros
    else:
        assert not found.finite


def test_nothing_is_left_out_where_a_norm_vanishes() -> None:
    """PEFT divides zero by zero there."""
    weight, made = usual(dora=True)
    weight[700], made.lora_b[700] = 0.0, 0.0
    merge = merged_blocks(weight, made, Buffers(block_elements=1))
    assert merge.candidates() is None
    assert math.isnan(measure_merge(merge).maximum)


@pytest.mark.parametrize(
    ("dora", "row", "size"),
    [(False, 200, 3e4), (False, 200, 6e4), *((True, row, size) for row in (3, 1500) for size in (4e5, 1e6, 1e38))],
)
def test_nothing_is_left_out_near_the_largest_value(dora, row, size) -> None:
    weight, made = usual(dora, torch.float16)
    if dora:
        made.magnitude[row] *= size
    else:
        weight[row, 3] = size
    merge = merged_blocks(weight, made, Buffers(block_elements=1))
    assert merge.candidates() is None
    assert measure_merge(merge).maximum == whole(merge).max().item()


@pytest.mark.parametrize(("dora", "dtype"), [(False, torch.bfloat16), (True, torch.bfloat16), (True, torch.float16)])
def test_of_a_usual_weight_few_blocks_are_left(dora, dtype) -> None:
    merge = merged_blocks(*usual(dora, dtype, rows=8192), Buffers(block_elements=1))
    candidates, rows_of, seen = merge.candidates(), merge.dense_rows(), []
    assert candidates is not None

    def merged(number: int) -> tuple[float, float]:
        seen.append(number)
        values = rows_of(merge.slices[number]).merged
        return values.min().item(), values.max().item()

    candidates.visit(merged)
    assert len(merge.slices) == 128
    assert len(seen) < (24 if dora else 16)


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


def test_norms_not_summed_in_float32_are_not_in_bfloat16(monkeypatch) -> None:
    assert norms_are_summed_in_float32()
    monkeypatch.setattr(screen, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(screen, "norms_are_summed_in_float32", lambda: False)
    weight, made = usual(dora=True)
    found = DoraScreen(weight, made, [slice(0, len(weight))], Buffers())
    assert found._rows().dtype is torch.float32
