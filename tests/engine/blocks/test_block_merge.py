"""Every road of the fast way against PEFT's own layer: the same bits, and true figures about them."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_gate.engine.blocks import block_merge
from merge_gate.engine.blocks.block_merge import measure_merge, merged_blocks
from merge_gate.engine.blocks.delta import LowRankUpdate
from merge_gate.engine.tensors.threads import Buffers
from tests.support.engine.blocks_layers import (
    DENSE,
    PACKED,
    QUANTIZED,
    base_values,
    before_the_check,
    by_peft,
    factors,
    in_blocks,
    quantized_layer,
    same_bits,
    threads,
    tuner_layer,
    update_of,
    whole,
)
from tests.support.properties import examples

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = st.one_of(st.integers(1, 80), st.sampled_from([127, 128, 129, 255, 256, 257, 384, 511, 512, 513, 640]))
ROWS = st.one_of(
    st.integers(1, 80), st.integers(60, 400), st.sampled_from([255, 256, 257, 258, 259, 511, 513, 769, 1025])
)
RANKS = st.one_of(st.integers(1, 24), st.sampled_from([32, 33, 64, 65, 128, 256]))
SCALINGS = st.sampled_from([2.0, 1.0, 0.5, 16 / 3, 0.1, 32 / math.sqrt(12), -1.0, 3, 0.0])


def supports(weight: torch.Tensor, update: LowRankUpdate) -> bool:
    return merged_blocks(weight, update, Buffers()) is not None


def holds(layer, *, block_elements: int) -> None:
    """The merge in blocks has PEFT's values and scales, the base is as before, and the figures are of these."""
    before = base_values(layer)
    merge = in_blocks(layer, block_elements=block_elements)
    merged, scales = whole(merge), merge.scales
    found, figured = measure_merge(merge), measure_merge(merge, figures=True)
    assert same_bits(base_values(layer), before)
    peft, peft_scales = by_peft(layer)
    assert same_bits(merged, peft)
    assert {name: same_bits(scales[name], scale) for name, scale in peft_scales.items()} == dict.fromkeys(scales, True)
    assert (found.minimum, found.maximum) == (peft.min().item(), peft.max().item())
    assert found.changed == (not torch.equal(peft, before.to(peft.dtype)))
    assert found.finite
    assert found.numel == found.of == peft.numel()
    assert figured.figures.unchanged == int((peft == before).sum())
    assert (figured.minimum, figured.maximum, figured.changed) == (found.minimum, found.maximum, found.changed)


@settings(max_examples=examples(450), deadline=None)
@given(
    kind=st.sampled_from(DENSE),
    dora=st.booleans(),
    rows=ROWS,
    columns=WIDTHS,
    rank=RANKS,
    scaling=SCALINGS,
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    factor_dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    block_elements=st.sampled_from([1, 1 << 14, 1 << 16]),
    thread_count=st.sampled_from([1, 2]),
    seed=st.integers(0, 1 << 16),
)
def test_dense_weights_have_pefts_bits(
    kind, dora, rows, columns, rank, scaling, dtype, factor_dtype, block_elements, thread_count, seed
) -> None:
    """At one number of threads: for some odd shapes (5 x 127, rank 2) PEFT's own bits change with it."""
    dtypes = {"dtype": dtype, "factor_dtype": factor_dtype}
    if dora:
        dtypes = {"dtype": torch.float32 if dtype is torch.float64 else dtype}
    with threads(thread_count):
        layer = tuner_layer(kind, rows, columns, rank, dora=dora, scaling=scaling, seed=seed, **dtypes)
        holds(layer, block_elements=block_elements)


@settings(max_examples=examples(150), deadline=None)
@given(
    kind=st.sampled_from(PACKED),
    dora=st.booleans(),
    rows=ROWS,
    columns=st.sampled_from([64, 128, 192, 320, 512, 640]),
    rank=RANKS,
    scaling=SCALINGS,
    dtype=st.sampled_from(DTYPES),
    block_elements=st.sampled_from([1, 1 << 14]),
    seed=st.integers(0, 1 << 16),
)
def test_quantized_weights_have_pefts_bits(
    kind, dora, rows, columns, rank, scaling, dtype, block_elements, seed
) -> None:
    with threads(1):
        layer = tuner_layer(kind, rows, columns, rank, dora=dora, dtype=dtype, scaling=scaling, seed=seed)
        holds(layer, block_elements=block_elements)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "rank"), [(2048, 512, 16), (1025, 1024, 8), (300, 2816, 64)])
def test_the_bits_are_pefts_at_the_block_size_in_use(rows, columns, rank, dtype, dora) -> None:
    layer = tuner_layer("linear", rows, columns, rank, dora=dora, dtype=dtype, scaling=16 / 3)
    assert len(list(merged_blocks(layer.get_base_layer().weight, update_of(layer), Buffers()))) > 1
    with threads(1):
        holds(layer, block_elements=Buffers().block_elements)


@pytest.mark.parametrize("kind", ["conv1d", "embedding"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_product_whose_bits_depend_on_order_is_made_whole(kind, dora) -> None:
    """Four columns: MKL gives a row-major block other bits than a column-major one."""
    with threads(1):
        holds(tuner_layer(kind, 4, 128, 32, dora=dora, dtype=torch.float32), block_elements=1)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
def test_factors_off_their_alignment_merge_as_pefts_do(conv1d, factor_dtype) -> None:
    layer = tuner_layer("conv1d" if conv1d else "linear", 256, 5, 17, factor_dtype=factor_dtype)
    a, b = factors(layer)
    lora_a, lora_b = (torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t.data) for t in (a, b))
    update = LowRankUpdate(lora_a=lora_a, lora_b=lora_b, scaling=2.0, transposed=conv1d)
    merged = whole(merged_blocks(layer.get_base_layer().weight, update, Buffers(block_elements=1)))
    assert same_bits(merged, by_peft(layer)[0])


# --- what is broken ------------------------------------------------------------------------------------------------

NONFINITE = (math.nan, math.inf, -math.inf)


BREAKABLE = [  # all but the magnitude that LoRA does not have, and the integers, which are finite
    (kind, dora, side)
    for kind in (*DENSE, *QUANTIZED)
    for dora in (False, True)
    for side in ("lora_a", "lora_b", "weight", "magnitude")
    if (dora or side != "magnitude") and (kind in DENSE or side != "weight")
]


@pytest.mark.parametrize(("kind", "dora", "side"), BREAKABLE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", NONFINITE)
def test_one_nonfinite_value_anywhere_is_seen_as_peft_sees_it(kind, dora, side, dtype, value) -> None:
    layer = tuner_layer(kind, 200, 128, 4, dtype=dtype, dora=dora)
    tensors = {"weight": layer.get_base_layer().weight, **dict(zip(("lora_a", "lora_b"), factors(layer), strict=True))}
    if dora:
        tensors["magnitude"] = layer.lora_magnitude_vector["default"].weight
    tensors[side].data.view(-1)[-1] = value
    merge = in_blocks(layer)
    found = measure_merge(merge)
    assert not found.finite
    if kind in DENSE:
        assert same_bits(whole(merge), before_the_check(layer))
    with pytest.raises(ValueError, match="NaNs detected"):
        by_peft(layer)


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_zero_times_infinity_is_nan_as_in_peft(value, kind) -> None:
    layer = tuner_layer(kind, 200, 96, 4)
    lora_a, lora_b = factors(layer)
    lora_a.data[0, 7] = value
    lora_b.data.zero_()
    merge = in_blocks(layer)
    found, merged = measure_merge(merge), whole(merge)
    assert math.isnan(found.minimum)
    assert math.isnan(found.maximum)
    assert same_bits(merged, before_the_check(layer))
    assert int(merged.isnan().sum()) == 200


@pytest.mark.parametrize("scaling", [0.0, 1e-45, 1e-39, 1e39, 1e308, math.inf, math.nan])
def test_scalings_at_the_edge_of_float32_are_pefts(scaling) -> None:
    layer = tuner_layer("linear", 200, 96, 4, scaling=scaling)
    factors(layer)[0].data[0, 0] = math.inf
    merge = in_blocks(layer)
    assert same_bits(whole(merge), before_the_check(layer))
    assert not measure_merge(merge).finite


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_overflow_is_judged_in_the_final_dtype(sign, dtype) -> None:
    """Factors and delta are finite in float32; 70,000 is not in float16, not even with -20,000 to add it to."""
    layer = tuner_layer("linear", 200, 96, 1, dtype=dtype, scaling=1.0)
    lora_a, lora_b = factors(layer)
    lora_a.data.zero_()[0, 3] = 70_000.0
    lora_b.data.zero_()[150, 0] = sign
    layer.get_base_layer().weight.data[150, 3] = -20_000.0 * sign
    merge = in_blocks(layer)
    found = measure_merge(merge)
    assert same_bits(whole(merge), before_the_check(layer))
    assert found.finite == (dtype is not torch.float16)
    if dtype is torch.float16:
        assert (found.maximum if sign > 0 else found.minimum) == sign * math.inf


def test_a_product_that_overflows_before_its_scaling_is_infinite() -> None:
    layer = tuner_layer("linear", 200, 96, 4, scaling=1e-30)
    for factor in factors(layer):
        factor.data.fill_(1e20)
    merge = in_blocks(layer)
    assert same_bits(whole(merge), before_the_check(layer))
    assert measure_merge(merge).maximum == math.inf


def test_values_beyond_float16_break_an_8_bit_weight() -> None:
    """bitsandbytes quantises from float16: PEFT's check of float32 lets them through, the scales are infinite."""
    layer = tuner_layer("8bit", 200, 128, 4)
    factors(layer)[1].data[7] = 1e7
    found = measure_merge(in_blocks(layer))
    assert not found.finite
    assert {name: high for name, _, high in found.scales}["SCB"] == math.inf
    values, scales = by_peft(layer)
    assert not values.isfinite().all()
    assert scales["SCB"].max() == math.inf


@pytest.mark.parametrize("kind", DENSE)
def test_denormal_deltas_keep_their_bits(kind) -> None:
    layer = tuner_layer(kind, 200, 96, 8, dtype=torch.float32, scaling=0.5, size=1e-20)
    layer.get_base_layer().weight.data.zero_()
    merged = whole(in_blocks(layer))
    assert same_bits(merged, by_peft(layer)[0])
    assert 0 < merged.abs().max() < torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("rows", [[0], [3, 100], list(range(200))])
def test_quantized_rows_of_zeros_are_pefts(kind, rows) -> None:
    layer = tuner_layer(kind, 200, 128, 4, dtype=torch.float32)
    factors(layer)[1].data[rows] = 0.0
    zeros = base_values(layer)
    zeros[rows] = 0.0
    layer.base_layer = quantized_layer(kind, zeros)
    assert not base_values(layer)[rows].any()
    holds(layer, block_elements=1)


# --- figures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DENSE)
def test_an_empty_delta_changes_nothing(kind) -> None:
    layer = tuner_layer(kind, 700, 96, 4)
    factors(layer)[1].data.zero_()
    layer.get_base_layer().weight.data[0, 0] = -0.0  # -0.0 + 0.0 is 0.0: other bits, the same value
    merge = in_blocks(layer)
    assert not measure_merge(merge).changed
    found = measure_merge(merge, figures=True)
    assert not found.changed
    assert found.figures.unchanged == found.numel > 0
    assert found.figures.delta_sq == found.figures.lost_sq == 0.0


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_an_empty_delta_of_a_weight_on_the_grid_changes_nothing(kind) -> None:
    layer = tuner_layer(kind, 200, 128, 4, dtype=torch.float32)
    factors(layer)[1].data.zero_()
    if kind == "8bit":  # scales that float16 holds
        weight = layer.get_base_layer().weight
        weight.SCB = torch.ones_like(weight.SCB) * 127 / 128
        weight.data[:, 0] = 127
    before = base_values(layer)
    found = measure_merge(in_blocks(layer))
    assert found.changed == (not torch.equal(by_peft(layer)[0], before))
    assert found.numel == 200 * 128


@pytest.mark.parametrize("row", [0, 63, 64, 450, 699])
def test_one_changed_element_is_noticed_in_every_block(row) -> None:
    layer = tuner_layer("linear", 700, 96, 4)
    factors(layer)[1].data.zero_()[row, 0] = 50.0
    assert measure_merge(in_blocks(layer)).changed
    assert measure_merge(in_blocks(layer), figures=True).changed


@pytest.mark.parametrize(("position", "value"), [((0, 0), 9.0), ((64, 3), -9.0), ((699, 95), 9.0)])
def test_extremes_are_found_wherever_they_are(position, value) -> None:
    layer = tuner_layer("linear", 700, 96, 4, size=1e-3)
    layer.get_base_layer().weight.data[position] = value
    merge = in_blocks(layer)
    found, merged = measure_merge(merge), whole(merge)
    assert (found.maximum if value > 0 else found.minimum) == merged[position].item()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lost_and_delta_are_those_of_the_exact_sum(dtype, dora) -> None:
    layer = tuner_layer("linear", 300, 128, 8, dtype=dtype, size=0.01, dora=dora)
    weight = layer.get_base_layer().weight.detach().double()
    exact = weight + layer.get_delta_weight("default").detach().double()
    if dora:
        magnitude = layer.lora_magnitude_vector["default"].weight.detach().double()
        exact *= (magnitude / exact.norm(dim=1))[:, None]
    merge = in_blocks(layer)
    figures, merged = measure_merge(merge, figures=True).figures, whole(merge).double()
    assert figures.base_sq == pytest.approx(float(weight.square().sum()))
    assert figures.delta_sq == pytest.approx(float((exact - weight).square().sum()), rel=1e-5)
    lost = float((merged - exact).square().sum())
    assert figures.lost_sq == pytest.approx(lost, rel=1e-3 if dtype is not torch.float32 else 2, abs=1e-11)


@pytest.mark.parametrize("size", [1e-38, 1e-25, 1e-12, 1.0, 1e12, 1e25, 1e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_squares_hold_beyond_the_range_of_float32(dtype, size) -> None:
    values = torch.randn(130, 70, generator=torch.Generator().manual_seed(0)).mul(size).to(dtype)
    assert float(block_merge._sum_sq(values)) == pytest.approx(float(values.double().square().sum()), rel=1e-6)


def test_a_zero_that_loses_its_sign_has_kept_its_value() -> None:
    """DoRA with a negative magnitude makes -0.0 of 0.0."""
    layer = tuner_layer("linear", 4, 8, 2, dora=True)
    weight = layer.get_base_layer().weight.data
    weight[:, 4:], factors(layer)[0].data[:, 4:] = 0.0, 0.0
    layer.lora_magnitude_vector["default"].weight.data.fill_(-1.0)
    found = measure_merge(in_blocks(layer), figures=True)
    assert found.figures.unchanged == 16


# --- norms of blocks have the bits of those of the whole, or the whole is used -------------------------------------


def facts(rows: int, columns: int, *, transposed: bool) -> dict:
    shape = (columns, rows) if transposed else (rows, columns)
    starts = tuple(block.start for block in Buffers().blocks(*shape, torch.device("cpu")))
    return {"rows": rows, "columns": columns, "transposed": transposed, "starts": starts, "threads": 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
def test_norms_of_shapes_of_real_models_are_proved(transposed, dtype) -> None:
    for rows, columns in ((2048, 2048), (5632, 2048), (2048, 5632), (3072, 768), (768, 3072)):
        shape = facts(rows, columns, transposed=transposed)
        assert len(shape["starts"]) > 4
        assert block_merge.norms_proved(dtype=dtype, **shape)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "8bit", "4bit"])
def test_without_a_proof_of_norms_the_bits_are_the_same(monkeypatch, kind) -> None:
    monkeypatch.setattr(block_merge, "norms_proved", lambda **_: False)
    layer = tuner_layer(kind, 512, 320, 8, dora=True)
    merged = whole(in_blocks(layer))
    assert same_bits(merged, by_peft(layer)[0])


@pytest.mark.parametrize("transposed", [False, True])
def test_a_proof_of_norms_fails_where_one_bit_differs(monkeypatch, transposed) -> None:
    shape = facts(512, 512, transposed=transposed)
    genuine = block_merge.norms_of

    def nudged(summed: torch.Tensor) -> torch.Tensor:
        norms = genuine(summed)
        if len(norms) == 512:
            norms[131] = torch.nextafter(norms[131], torch.tensor(9e9))
        return norms

    assert block_merge.norms_proved.__wrapped__(dtype=torch.bfloat16, **shape)
    monkeypatch.setattr(block_merge, "norms_of", nudged)
    assert not block_merge.norms_proved.__wrapped__(dtype=torch.bfloat16, **shape)


# --- samples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*DENSE, *QUANTIZED])
@pytest.mark.parametrize("dora", [False, True])
def test_a_sample_is_of_rows_all_over_the_weight_and_says_so(kind, dora) -> None:
    layer = tuner_layer(kind, *((4096, 512) if kind not in {"conv1d", "embedding"} else (512, 4096)), 8, dora=dora)
    merge = in_blocks(layer, block_elements=1 << 17)
    sample = merge.sampled()
    if dora and kind in {"conv1d", "embedding"}:
        assert sample is None
        return
    found, exact = measure_merge(sample, figures=True), measure_merge(merge, figures=True)
    assert found.estimated
    assert not exact.estimated
    assert (found.of, found.numel) == (4096 * 512, -(-4096 // 15) * 512)
    share = found.numel / found.of
    for name in ("delta_sq", "lost_sq", "base_sq"):
        assert getattr(found.figures, name) == pytest.approx(getattr(exact.figures, name) * share, rel=0.1), name
    assert found.figures.unchanged == pytest.approx(exact.figures.unchanged * share, rel=0.2, abs=20)


def test_a_sample_of_few_rows_is_all_of_them() -> None:
    merge = in_blocks(tuner_layer("linear", 127, 96, 4))
    found = measure_merge(merge.sampled(), figures=True)
    assert found == measure_merge(merge, figures=True)
    assert not found.estimated


@pytest.mark.parametrize("rows", [2048, 4096, 5120])
def test_a_sample_meets_every_place_of_an_attention_head(rows) -> None:
    """Rows i and i + 64 of each head turn together: a sample of those alone would speak for no other pair."""
    weight = torch.zeros(rows, 2048)
    for pair in range(64):
        lora_b = (torch.arange(rows) % 64 == pair).float()[:, None]
        update = LowRankUpdate(lora_a=torch.ones(1, 2048), lora_b=lora_b, scaling=1.0)
        found = measure_merge(merged_blocks(weight, update, Buffers()).sampled())
        assert found.changed, pair
        assert found.numel < 130 * 2048


# --- threads, devices, what is not taken ---------------------------------------------------------------------------


def test_weights_merge_side_by_side_in_threads_of_their_own() -> None:
    layers = [tuner_layer("linear", 300 + seed, 96, 4, seed=seed, dora=seed % 2 == 1) for seed in range(12)]
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        merged = list(pool.map(lambda layer: whole(in_blocks(layer)), layers))
    for layer, got in zip(layers, merged, strict=True):
        assert same_bits(got, by_peft(layer)[0])


def test_the_same_buffers_serve_weights_of_any_shape_and_dtype() -> None:
    buffers = Buffers(block_elements=1 << 12)
    for rows, columns, dtype in ((300, 96, torch.bfloat16), (70, 512, torch.float16), (900, 33, torch.float32)) * 2:
        layer = tuner_layer("linear", rows, columns, 4, dtype=dtype)
        merged = whole(merged_blocks(layer.get_base_layer().weight, update_of(layer), buffers))
        assert same_bits(merged, by_peft(layer)[0])


W, A, B, M = torch.zeros(6, 8), torch.zeros(2, 8), torch.zeros(6, 2), torch.zeros(6)


@pytest.mark.parametrize(
    ("weight", "lora_a", "lora_b", "magnitude"),
    [
        (W.to(torch.int8), A, B, None),
        (W, A.double(), B, None),
        (W.T.contiguous(), A, B, None),
        (torch.zeros(0, 8), A, B[:0], None),
        (W, A[:0], B[:, :0], None),
        (W, A[:1], B, None),
        (W.flatten(), A, B, None),
        (W.to_sparse(), A, B, None),
        (W.to("meta"), A, B, None),
        (W.to(torch.float8_e4m3fn), A, B, None),
        (W, A, B, M[:5]),
        (W, A.half(), B.half(), M),
        (W, A, B, M.half()),
        (W.double(), A, B, M),
    ],
)
def test_what_is_not_an_update_of_a_plain_weight_is_left_to_peft(weight, lora_a, lora_b, magnitude) -> None:
    update = LowRankUpdate(lora_a=lora_a, lora_b=lora_b, scaling=1.0, magnitude=magnitude)
    assert not supports(weight, update)


def test_a_plain_weight_is_supported_in_both_layouts() -> None:
    straight, swapped = (LowRankUpdate(lora_a=A, lora_b=B, scaling=1.0, transposed=t) for t in (False, True))
    assert supports(W, straight)
    assert supports(torch.nn.Parameter(W), straight)
    assert supports(W.T.contiguous(), swapped)
    assert not supports(W, swapped)


@pytest.mark.parametrize(("kind", "columns"), [("4bit", 96), ("4bit-double", 33)])
def test_4_bit_rows_that_share_scales_are_left_to_peft(kind, columns) -> None:
    layer = tuner_layer(kind, 64, columns, 4)
    assert not supports(layer.get_base_layer().weight, update_of(layer))


def test_an_8_bit_weight_without_its_scales_is_left_to_peft() -> None:
    layer = tuner_layer("8bit", 64, 64, 4)
    assert not supports(layer.get_base_layer().weight, update_of(layer))
