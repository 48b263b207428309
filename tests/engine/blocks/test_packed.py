"""Extremes of a quantised merge, from two values of each scale, against bitsandbytes' whole tensors."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_gate.engine.blocks import packed
from merge_gate.engine.blocks.block_merge import measure_merge
from merge_gate.engine.tensors.quantized import dequantized, scales
from tests.support.engine.blocks_layers import QUANTIZED, by_peft, in_blocks, quantized_layer, threads, tuner_layer
from tests.support.properties import examples

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@settings(max_examples=examples(60), deadline=None)
@given(
    kind=st.sampled_from(QUANTIZED),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1e-42, 1e-38, 1e-20, 1e-6, 0.02, 1.0, 1e3]),
    zeros=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
def test_extremes_and_scales_are_those_of_all_values(kind, quant_type, dtype, size, zeros, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(96, 320, generator=generator).mul(size).to(dtype)
    if zeros:
        values[::3] = 0.0
    with threads(1):
        module = quantized_layer(kind, values, quant_type)
        row_scales = getattr(module.weight, "SCB", None)
        made = (
            packed.Int8Values.of(module.weight, row_scales) if kind == "8bit" else packed.Int4Values.of(module.weight)
        )
        extremes = made.extremes(dtype)
        for rows in (slice(0, 64), slice(64, 96)):
            extremes.put(rows, values[rows])
        ends, found = extremes.finish()
        expected = dequantized(module, module.weight)
    assert torch.equal(ends.to(expected.dtype), extremes.of(expected))
    assert all(torch.equal(found[name], scale) for name, scale in scales(module, module.weight))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_this_bitsandbytes_quantises_as_it_is_assumed(quant_type, dtype) -> None:
    """Else every value is quantised: right, and twenty times slower."""
    assert packed._ends_proved(quant_type, 64, dtype)


@pytest.fixture
def another_rounding(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is proved of this bitsandbytes does not hold."""
    monkeypatch.setattr(packed, "LEAST_SCALE", 1e-30)
    packed._ends_proved.cache_clear()
    yield
    packed._ends_proved.cache_clear()


@pytest.mark.usefixtures("another_rounding")
def test_another_bitsandbytes_has_every_value_quantised() -> None:
    with threads(1):
        layer = tuner_layer("4bit-double", 200, 128, 4)
        found = measure_merge(in_blocks(layer))
        values, _ = by_peft(layer)
    assert packed.Int4Values.of(layer.get_base_layer().weight).extremes(torch.float32) is None
    assert (found.minimum, found.maximum) == (values.min().item(), values.max().item())
    assert found.changed
