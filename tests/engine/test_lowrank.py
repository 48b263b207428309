"""The fast way against PEFT's own layer: the same bits, and true figures about them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora import layer as lora_layer
from transformers.pytorch_utils import Conv1D

from merge_gate.engine import lowrank
from merge_gate.engine.lowrank import (
    Extent,
    LowRankMerge,
    Scratch,
    delta_norm_sq,
    extent,
    merge_measured,
    merge_sample,
    merged_bound,
    supports,
)
from merge_gate.engine.stream import stream_to

if TYPE_CHECKING:
    from collections.abc import Iterator

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float64: torch.int64}
WIDTHS = st.one_of(st.integers(1, 80), st.sampled_from([127, 128, 129, 255, 256, 257, 384, 511, 512, 513, 640]))
ROWS = st.one_of(
    st.integers(1, 80), st.integers(60, 400), st.sampled_from([255, 256, 257, 258, 259, 511, 513, 769, 1025])
)
RANKS = st.one_of(st.integers(1, 24), st.sampled_from([32, 33, 64, 65, 128, 256]))
SCALINGS = st.sampled_from([2.0, 1.0, 0.5, 16 / 3, 0.1, 32 / math.sqrt(12), -1.0, 3])


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def lora_linear(
    rows: int,
    columns: int,
    rank: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    factor_dtype: torch.dtype = torch.float32,
    scaling: float = 2.0,
    conv1d: bool = False,
    seed: int = 0,
    size: float = 0.1,
) -> lora_layer.Linear:
    """A real PEFT layer with pseudo-random weight and factors. `rows` and `columns` are those of lora_B @ lora_A."""
    torch.manual_seed(seed)
    base = Conv1D(rows, columns) if conv1d else torch.nn.Linear(columns, rows, bias=False)
    base.weight.data.normal_(std=0.05)
    config = LoraConfig(r=rank, fan_in_fan_out=conv1d)
    layer = lora_layer.Linear(base.to(dtype), "default", config, r=rank, lora_alpha=8, is_target_conv_1d_layer=conv1d)
    layer.lora_A["default"].weight.data.normal_(std=size)
    layer.lora_B["default"].weight.data.normal_(std=size)
    layer.lora_A.to(factor_dtype)
    layer.lora_B.to(factor_dtype)
    layer.scaling["default"] = scaling
    return layer


def fast(layer: lora_layer.Linear, *, scratch: Scratch | None = None):
    """What was found, and the merged weight put together from the emitted blocks."""
    weight = layer.get_base_layer().weight
    merged = torch.full_like(weight, -777.0)

    def keep(row: int, block: torch.Tensor) -> None:
        merged[row : row + len(block)] = block

    with torch.no_grad():
        found = merge_measured(
            weight,
            layer.lora_A["default"].weight,
            layer.lora_B["default"].weight,
            layer.scaling["default"],
            scratch=scratch or Scratch(),
            fan_in_fan_out=layer.fan_in_fan_out,
            emit=keep,
        )
    return found, merged


def before_the_check(layer: lora_layer.Linear) -> torch.Tensor:
    """What PEFT's safe_merge looks at, for merges that it refuses."""
    with torch.no_grad():
        weight = layer.get_base_layer().weight.data.clone()
        weight += layer.get_delta_weight("default").to(weight.dtype)
    return weight


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Bit by bit; a NaN equals any NaN, since PEFT's own NaN payload depends on the vector width."""
    both_nan = left.isnan() & right.isnan()
    bits = BITS[left.dtype]
    return bool(((left.view(bits) == right.view(bits)) | both_nan).all())


@settings(max_examples=250, deadline=None)
@given(
    rows=ROWS,
    columns=WIDTHS,
    rank=RANKS,
    scaling=SCALINGS,
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    factor_dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    conv1d=st.booleans(),
    block_elements=st.sampled_from([1, 1 << 14, 1 << 16]),
    thread_count=st.sampled_from([1, 2]),
    seed=st.integers(0, 1 << 16),
)
def test_the_bits_are_pefts(
    rows, columns, rank, scaling, dtype, factor_dtype, conv1d, block_elements, thread_count, seed
) -> None:
    """At one number of threads: for some odd shapes (5 x 127, rank 2) PEFT's own bits change with it."""
    layer = lora_linear(
        rows, columns, rank, dtype=dtype, factor_dtype=factor_dtype, scaling=scaling, conv1d=conv1d, seed=seed
    )
    with threads(thread_count):
        before = layer.get_base_layer().weight.data.clone()
        found, merged = fast(layer, scratch=Scratch(block_elements=block_elements))
        assert same_bits(layer.get_base_layer().weight.data, before)
        layer.merge(safe_merge=True)
    peft = layer.get_base_layer().weight.data
    assert same_bits(merged, peft)
    assert (found.minimum, found.maximum) == (peft.min().item(), peft.max().item())
    assert found.figures.unchanged == int((peft == before).sum())
    assert found.changed == (not torch.equal(peft, before))
    assert found.finite
    assert found.numel == found.merged == peft.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "rank"), [(2048, 512, 16), (1025, 1024, 8), (300, 2816, 64)])
def test_the_bits_are_pefts_at_the_block_size_in_use(rows, columns, rank, dtype) -> None:
    layer = lora_linear(rows, columns, rank, dtype=dtype, scaling=16 / 3)
    scratch = Scratch()
    _, merged = fast(layer, scratch=scratch)
    assert len(scratch.blocks(rows, columns, torch.device("cpu"))) > 1
    layer.merge(safe_merge=True)
    assert same_bits(merged, layer.get_base_layer().weight.data)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
def test_factors_off_their_alignment_merge_as_peft_would_have_loaded_them(conv1d, factor_dtype) -> None:
    layer = lora_linear(256, 5, 17, factor_dtype=factor_dtype, conv1d=conv1d)
    a, b = (part["default"].weight.data for part in (layer.lora_A, layer.lora_B))
    shifted = [torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t) for t in (a, b)]
    blocks: dict[int, torch.Tensor] = {}
    weight = layer.get_base_layer().weight
    merge_measured(
        weight,
        *shifted,
        2.0,
        scratch=Scratch(block_elements=1),
        fan_in_fan_out=conv1d,
        emit=lambda row, x: blocks.update({row: x.clone()}),
    )
    layer.merge(safe_merge=True)
    assert same_bits(torch.cat([blocks[row] for row in sorted(blocks)]), layer.get_base_layer().weight.data)


def test_a_shape_whose_blocks_differ_is_multiplied_whole(monkeypatch) -> None:
    """On this machine every shape may prove well: so the short last blocks that are known to differ are forced."""

    def short_last_blocks(self: Scratch, rows: int, columns: int, device: torch.device) -> tuple[slice, ...]:
        del self, columns, device
        return tuple(slice(start, min(start + 64, rows)) for start in range(0, rows, 64))

    monkeypatch.setattr(Scratch, "blocks", short_last_blocks)
    for rows in (65, 66, 67, 69, 193):
        for columns, rank in ((16, 2), (100, 17), (100, 64), (33, 7)):
            layer = lora_linear(rows, columns, rank, dtype=torch.float32)
            _, merged = fast(layer, scratch=Scratch(block_elements=1))
            layer.merge(safe_merge=True)
            assert same_bits(merged, layer.get_base_layer().weight.data), (rows, columns, rank)


def test_a_failed_proof_leads_to_the_whole_product(monkeypatch) -> None:
    monkeypatch.setattr(lowrank, "_proved", lambda **_: False)
    layer = lora_linear(700, 96, 8, dtype=torch.float32)
    scratch = Scratch(block_elements=1)
    found, merged = fast(layer, scratch=scratch)
    layer.merge(safe_merge=True)
    assert same_bits(merged, layer.get_base_layer().weight.data)
    assert not [name for name, *_ in scratch._buffers if name == "product"]
    assert found.numel == 700 * 96


@pytest.mark.parametrize("transposed", [False, True])
def test_shapes_of_real_models_are_proved(transposed) -> None:
    """Else the fast way is not fast: whole products come in through the back door (as they do for float64 Conv1D)."""
    for rows, columns in ((2048, 2048), (5632, 2048), (2048, 5632), (3072, 768), (768, 3072)):
        blocks = Scratch().blocks(rows, columns, torch.device("cpu"))
        assert len(blocks) > 4
        starts = tuple(block.start for block in blocks)
        facts = {"rows": rows, "columns": columns, "rank": 16, "starts": starts, "threads": torch.get_num_threads()}
        assert lowrank._proved(dtype=torch.float32, transposed=transposed, **facts)


def test_the_proof_fails_where_one_block_differs_in_one_bit(monkeypatch) -> None:
    facts = {"rows": 256, "columns": 64, "rank": 4, "dtype": torch.float32, "transposed": False, "threads": 1}
    assert lowrank._proved.__wrapped__(starts=(0, 64, 128), **facts)
    genuine = lowrank._Factors.whole

    def nudged(factors: lowrank._Factors) -> torch.Tensor:
        product = genuine(factors)
        product[131, 5] = torch.nextafter(product[131, 5], torch.tensor(9.0))
        return product

    monkeypatch.setattr(lowrank._Factors, "whole", nudged)
    assert not lowrank._proved.__wrapped__(starts=(0, 64, 128), **facts)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 127, 128, 129, 191, 1000])
def test_blocks_cover_every_row_once_and_none_is_short(rows) -> None:
    blocks = Scratch(block_elements=1).blocks(rows, 4096, torch.device("cpu"))
    covered = [row for block in blocks for row in range(block.start, block.stop)]
    assert covered == list(range(rows))
    assert len(blocks) == 1 or min(block.stop - block.start for block in blocks) >= 64


NONFINITE = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize("side", ["lora_A", "lora_B", "weight"])
def test_one_nonfinite_value_anywhere_is_seen_as_peft_sees_it(side, value, dtype, conv1d) -> None:
    layer = lora_linear(200, 96, 4, dtype=dtype, conv1d=conv1d)
    tensor = layer.get_base_layer().weight if side == "weight" else getattr(layer, side)["default"].weight
    tensor.data[-1, -1] = value
    found, merged = fast(layer, scratch=Scratch(block_elements=1))
    assert not found.finite
    assert same_bits(merged, before_the_check(layer))
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_zero_times_infinity_is_nan_as_in_peft(value) -> None:
    layer = lora_linear(200, 96, 4)
    layer.lora_A["default"].weight.data[0, 7] = value
    layer.lora_B["default"].weight.data.zero_()
    found, merged = fast(layer, scratch=Scratch(block_elements=1))
    assert math.isnan(found.minimum)
    assert math.isnan(found.maximum)
    assert same_bits(merged, before_the_check(layer))
    assert int(merged.isnan().sum()) == 200


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_overflow_is_judged_in_the_final_dtype(sign, dtype) -> None:
    """Factors and delta are finite in float32; 70,000 is not in float16, not even with -20,000 to add it to."""
    layer = lora_linear(200, 96, 1, dtype=dtype, scaling=1.0)
    layer.lora_A["default"].weight.data.zero_()[0, 3] = 70_000.0
    layer.lora_B["default"].weight.data.zero_()[150, 0] = sign
    layer.get_base_layer().weight.data[150, 3] = -20_000.0 * sign
    found, merged = fast(layer, scratch=Scratch(block_elements=1))
    assert same_bits(merged, before_the_check(layer))
    assert found.finite == (dtype is not torch.float16)
    if dtype is torch.float16:
        assert (found.maximum if sign > 0 else found.minimum) == sign * math.inf


def test_denormal_deltas_keep_their_bits() -> None:
    layer = lora_linear(200, 96, 8, dtype=torch.float32, scaling=0.5, size=1e-20)
    layer.get_base_layer().weight.data.zero_()
    _, merged = fast(layer, scratch=Scratch(block_elements=1))
    layer.merge(safe_merge=True)
    assert same_bits(merged, layer.get_base_layer().weight.data)
    assert 0 < merged.abs().max() < torch.finfo(torch.float32).tiny


def test_without_figures_all_else_is_the_same() -> None:
    layer = lora_linear(700, 96, 4)
    arguments = (layer.get_base_layer().weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight, 2.0)
    found = merge_measured(*arguments, scratch=Scratch(block_elements=1))
    bare = merge_measured(*arguments, scratch=Scratch(block_elements=1), figures=False)
    assert bare == dataclasses.replace(found, figures=None)
    layer.lora_B["default"].weight.data.zero_()
    assert not merge_measured(*arguments, scratch=Scratch(block_elements=1), figures=False).changed
    layer.lora_B["default"].weight.data[699, 0] = 50.0
    assert merge_measured(*arguments, scratch=Scratch(block_elements=1), figures=False).changed


def test_an_empty_delta_changes_nothing() -> None:
    layer = lora_linear(700, 96, 4)
    layer.lora_B["default"].weight.data.zero_()
    layer.get_base_layer().weight.data[0, 0] = -0.0  # -0.0 + 0.0 is 0.0: other bits, the same value
    found, _ = fast(layer, scratch=Scratch(block_elements=1))
    assert not found.changed
    assert found.figures.unchanged == found.merged > 0
    assert found.figures.delta_sq == found.figures.lost_sq == 0.0


@pytest.mark.parametrize("row", [0, 63, 64, 450, 699])
def test_one_changed_element_is_noticed_in_every_block(row) -> None:
    layer = lora_linear(700, 96, 4)
    layer.lora_B["default"].weight.data.zero_()[row, 0] = 50.0
    found, _ = fast(layer, scratch=Scratch(block_elements=1))
    assert found.changed


@pytest.mark.parametrize(("position", "value"), [((0, 0), 9.0), ((64, 3), -9.0), ((699, 95), 9.0)])
def test_extremes_are_found_wherever_they_are(position, value) -> None:
    layer = lora_linear(700, 96, 4, size=1e-3)
    layer.get_base_layer().weight.data[position] = value
    found, merged = fast(layer, scratch=Scratch(block_elements=1))
    assert (found.maximum if value > 0 else found.minimum) == merged[position].item()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_lost_and_delta_are_those_of_the_exact_sum(dtype) -> None:
    layer = lora_linear(300, 128, 8, dtype=dtype, size=0.01)
    weight = layer.get_base_layer().weight.detach().double()
    found, merged = fast(layer, scratch=Scratch(block_elements=1))
    exact = layer.get_delta_weight("default").detach().double()
    assert found.figures.delta_sq == pytest.approx(float(exact.square().sum()), rel=1e-6)
    assert found.figures.lost_sq == pytest.approx(float((merged.double() - weight - exact).square().sum()), rel=1e-3)


# --- a bound and a sample instead of the whole ------------------------------------------------------------------------


def bound_of(layer: lora_layer.Linear) -> float:
    weight = layer.get_base_layer().weight.detach()
    factors = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
    return merged_bound(float(weight.abs().max()), *factors, layer.scaling["default"], weight.dtype)


@settings(max_examples=250, deadline=None)
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
    layer = lora_linear(rows, columns, rank, dtype=dtype, factor_dtype=factor_dtype, scaling=scaling, seed=seed)
    weight = layer.get_base_layer().weight.data
    largest = torch.finfo(dtype).max
    weight.copy_(torch.randn(weight.shape).mul(weight_size).clamp(-largest, largest))
    for side in (layer.lora_A, layer.lora_B):
        values = side["default"].weight.data
        values.fill_(size) if constant else values.normal_(std=size)
    bound = bound_of(layer)
    if math.isfinite(bound):
        layer.merge(safe_merge=safe)
        merged = layer.get_base_layer().weight.data.double()
        assert merged.isfinite().all()
        assert float(merged.abs().max()) <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 16, 256])
def test_the_bound_is_no_more_than_twice_what_can_happen(dtype, rank) -> None:
    """Equal values everywhere: every product has the same sign and the largest size."""
    layer = lora_linear(70, 40, rank, dtype=dtype)
    layer.get_base_layer().weight.data.fill_(0.25)
    for side in (layer.lora_A, layer.lora_B):
        side["default"].weight.data.fill_(0.5)
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
    assert merged_bound(weight, lora_a, lora_b, scaling, dtype) == math.inf, what


def test_factors_whose_sums_a_device_may_round_to_half_have_no_bound() -> None:
    lora_a, lora_b = torch.ones(4, 8, dtype=torch.bfloat16), torch.ones(8, 4, dtype=torch.bfloat16)
    assert merged_bound(1.0, lora_a, lora_b, 1.0, torch.bfloat16) == math.inf
    assert merged_bound(1.0, lora_a.float(), lora_b.float(), 1.0, torch.bfloat16) == pytest.approx(10.0)


def sample(layer: lora_layer.Linear, sample_elements: int = 1) -> LowRankMerge:
    return merge_sample(
        layer.get_base_layer().weight,
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        layer.scaling["default"],
        scratch=Scratch(),
        fan_in_fan_out=layer.fan_in_fan_out,
        sample_elements=sample_elements,
    )


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_is_of_rows_all_over_the_weight(dtype, conv1d) -> None:
    layer = lora_linear(*((96, 640) if conv1d else (640, 96)), 8, dtype=dtype, conv1d=conv1d)
    before = layer.get_base_layer().weight.detach()[::9]
    found = sample(layer)
    merged = before_the_check(layer)[::9]
    assert (found.numel, found.merged) == (640 * 96, 72 * 96)
    assert (found.minimum, found.maximum) == pytest.approx((merged.min().item(), merged.max().item()), rel=1e-2)
    assert found.figures.unchanged == pytest.approx(int((merged == before).sum()), abs=2)
    assert found.changed
    assert found.figures.base_sq == pytest.approx(float(before.double().square().sum()))
    exact = layer.get_delta_weight("default").detach()[::9].double()
    assert found.figures.delta_sq == pytest.approx(float(exact.square().sum()), rel=1e-5)


def test_a_sample_of_few_rows_is_all_of_them_and_has_the_figures_of_the_whole() -> None:
    layer = lora_linear(127, 96, 4)
    whole, _ = fast(layer)
    assert sample(layer) == whole
    layer = lora_linear(1270, 96, 4)
    whole, _ = fast(layer)
    assert sample(layer, 1270 * 96 // 2 + 96) == whole


@pytest.mark.parametrize("rows", [2048, 4096, 5120])
def test_a_sample_meets_every_place_of_an_attention_head(rows) -> None:
    """Rows i and i + 64 of each head turn together: a sample of those alone would speak for no other pair."""
    weight = torch.zeros(rows, 1)
    for pair in range(64):
        lora_b = (torch.arange(rows) % 64 == pair).float()[:, None]
        found = merge_sample(weight, torch.ones(1, 1), lora_b, 1.0, scratch=Scratch(), sample_elements=1)
        assert found.changed, pair
        assert found.merged < 70


def test_a_change_outside_of_the_sample_is_not_in_its_figures() -> None:
    layer = lora_linear(640, 96, 4)
    layer.lora_B["default"].weight.data.zero_()[1, 0] = 50.0
    assert not sample(layer).changed
    layer.lora_B["default"].weight.data.zero_()[9, 0] = 50.0
    assert sample(layer).changed


def test_modules_merge_side_by_side_in_threads_of_their_own() -> None:
    layers = [lora_linear(300 + seed, 96, 4, seed=seed) for seed in range(12)]

    def merge(layer: lora_layer.Linear) -> torch.Tensor:
        return fast(layer, scratch=Scratch(block_elements=1))[1]

    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        merged = list(pool.map(merge, layers))
    for layer, got in zip(layers, merged, strict=True):
        layer.merge(safe_merge=True)
        assert same_bits(got, layer.get_base_layer().weight.data)


def test_one_scratch_serves_modules_of_any_shape_and_dtype() -> None:
    scratch = Scratch(block_elements=1 << 12)
    for rows, columns, dtype in ((300, 96, torch.bfloat16), (70, 512, torch.float16), (900, 33, torch.float32)) * 2:
        layer = lora_linear(rows, columns, 4, dtype=dtype)
        _, merged = fast(layer, scratch=scratch)
        layer.merge(safe_merge=True)
        assert same_bits(merged, layer.get_base_layer().weight.data)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 200), columns=st.integers(1, 200), rank=st.integers(1, 32), seed=st.integers(0, 99))
def test_the_norm_needs_no_pass_over_the_delta(rows, columns, rank, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
    exact = float((b.double() @ a.double() * 0.7).square().sum())
    assert delta_norm_sq(a, b, 0.7) == pytest.approx(exact, rel=1e-9)


def test_the_norm_of_nothing_is_zero_and_of_nan_is_nan() -> None:
    a, b = torch.randn(4, 30), torch.zeros(50, 4)
    assert delta_norm_sq(a, b, 2.0) == 0.0
    b[3, 1] = math.nan
    assert math.isnan(delta_norm_sq(a, b, 2.0))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int64]
)
@pytest.mark.parametrize("sum_sq", [False, True])
def test_extent_of_any_dtype(dtype, sum_sq) -> None:
    tensor = (torch.randn(37, 5, 11) * 40).to(torch.int64).clamp(0, 127).to(dtype)
    wide = tensor.double()
    got = extent(tensor, scratch=Scratch(block_elements=100), sum_sq=sum_sq)
    assert (got.numel, got.minimum, got.maximum) == (tensor.numel(), wide.min().item(), wide.max().item())
    assert got.finite
    assert got.sum_sq == (pytest.approx(float(wide.square().sum()), rel=1e-9) if sum_sq else None)


@pytest.mark.parametrize("sum_sq", [False, True])
@pytest.mark.parametrize("value", NONFINITE)
def test_extent_carries_nonfinite_values(value, sum_sq) -> None:
    tensor = torch.randn(40, 40, dtype=torch.bfloat16)
    tensor[-1, -2] = value
    got = extent(tensor, scratch=Scratch(block_elements=100), sum_sq=sum_sq)
    assert not got.finite
    assert value != value or value in (got.minimum, got.maximum)


def test_extent_of_large_and_of_no_values() -> None:
    large = torch.full((10,), 1e30)
    assert extent(large, scratch=Scratch(), sum_sq=True).sum_sq == pytest.approx(1e61, rel=1e-6)
    assert extent(torch.empty(0, 3), scratch=Scratch(), sum_sq=True) == Extent(
        numel=0, minimum=None, maximum=None, sum_sq=0.0
    )


def test_extent_of_a_transposed_view() -> None:
    tensor = torch.randn(30, 20).T
    got = extent(tensor, scratch=Scratch(block_elements=64), sum_sq=True)
    assert (got.minimum, got.maximum) == (tensor.min().item(), tensor.max().item())


W, A, B = torch.zeros(6, 8), torch.zeros(2, 8), torch.zeros(6, 2)


@pytest.mark.parametrize(
    ("weight", "lora_a", "lora_b"),
    [
        (W.to(torch.int8), A, B),
        (W, A.double(), B),
        (W.T.contiguous(), A, B),
        (torch.zeros(0, 8), A, B[:0]),
        (W, A[:0], B[:, :0]),
        (W, A[:1], B),
        (W.flatten(), A, B),
        (W.to_sparse(), A, B),
        (W.to("meta"), A, B),
        (W.to(torch.float8_e4m3fn), A, B),
    ],
)
def test_what_is_not_a_plain_linear_is_left_to_peft(weight, lora_a, lora_b) -> None:
    assert not supports(weight, lora_a, lora_b)
    with pytest.raises(ValueError, match="not a vanilla LoRA"):
        merge_measured(weight, lora_a, lora_b, 1.0, scratch=Scratch())


def test_a_plain_linear_is_supported_in_both_layouts() -> None:
    assert supports(W, A, B)
    assert supports(torch.nn.Parameter(W), A, B)
    assert supports(W.T.contiguous(), A, B, fan_in_fan_out=True)
    assert not supports(W, A, B, fan_in_fan_out=True)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_merges_have_the_bits_of_peft_on_cuda(dtype) -> None:
    cuda = torch.device("cuda")
    layers = [lora_linear(rows, 512, 16, dtype=dtype, seed=rows) for rows in (256, 1000, 2048, 300)]
    weights = [layer.get_base_layer().weight.detach().clone() for layer in layers]
    scratch = Scratch()
    for layer, weight in zip(layers, stream_to(cuda, weights), strict=True):
        layer.to(cuda)
        blocks: list[torch.Tensor] = []
        factors = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
        found = merge_measured(
            weight, *factors, 2.0, scratch=scratch, emit=lambda _, x, to=blocks: to.append(x.clone())
        )
        layer.merge(safe_merge=True)
        peft = layer.get_base_layer().weight.data
        assert same_bits(torch.cat(blocks), peft)
        assert (found.minimum, found.maximum) == (peft.min().item(), peft.max().item())


def test_figures_of_one_merge_are_plain_numbers() -> None:
    found, _ = fast(lora_linear(64, 64, 4))
    assert isinstance(found, LowRankMerge)
    kinds = [type(getattr(found, name)) for name in found.__slots__]
    assert kinds == [int, int, float, float, bool, lowrank.Figures]
