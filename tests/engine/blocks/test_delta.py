"""Blocks of a product have the bits of the whole, or the whole is made."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_gate.engine.blocks import delta
from merge_gate.engine.blocks.block_merge import merged_blocks
from merge_gate.engine.blocks.delta import LowRankUpdate
from merge_gate.engine.tensors.threads import Buffers
from tests.support.engine.blocks_layers import by_peft, factors, in_blocks, same_bits, tuner_layer, update_of, whole
from tests.support.properties import examples

CPU = torch.device("cpu")


def facts(rows: int, columns: int, *, transposed: bool = False, **more) -> dict:
    starts = tuple(block.start for block in Buffers(**more).blocks(rows, columns, CPU))
    return {
        "rows": rows,
        "columns": columns,
        "rank": 16,
        "dtype": torch.float32,
        "transposed": transposed,
        "starts": starts,
        "threads": torch.get_num_threads(),
    }


@pytest.mark.parametrize("transposed", [False, True])
def test_shapes_of_real_models_are_proved(transposed) -> None:
    """Else the fast way is not fast: whole products come in through the back door (as they do for float64 Conv1D)."""
    for rows, columns in ((2048, 2048), (5632, 2048), (2048, 5632), (3072, 768), (768, 3072)):
        shape = facts(rows, columns, transposed=transposed)
        assert len(shape["starts"]) > 4
        assert delta._proved(**shape)


class ShortLastBlocks(Buffers):
    def blocks(self, rows: int, columns: int, device: torch.device) -> tuple[slice, ...]:
        del columns, device
        return tuple(slice(start, min(start + 64, rows)) for start in range(0, rows, 64))


def test_a_shape_whose_blocks_differ_is_multiplied_whole() -> None:
    """On this machine every shape may prove well: so the short last blocks that are known to differ are forced."""
    for rows in (65, 66, 67, 69, 193):
        for columns, rank in ((16, 2), (100, 17), (100, 64), (33, 7)):
            for dora in (False, True):
                layer = tuner_layer("linear", rows, columns, rank, dtype=torch.float32, dora=dora)
                weight = layer.get_base_layer().weight
                merged = whole(merged_blocks(weight, update_of(layer), ShortLastBlocks()))
                assert same_bits(merged, by_peft(layer)[0]), (rows, columns, rank, dora)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "8bit", "4bit-double"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("proof", [False, True])
def test_without_a_proof_the_bits_are_the_same(monkeypatch, proof, dora, kind) -> None:
    monkeypatch.setattr(delta.Factors, "proved", lambda _, blocks: proof and len(blocks) > 1)
    layer = tuner_layer(kind, 700, 128, 8, dtype=torch.float32, dora=dora, scaling=0.7)
    merged = whole(in_blocks(layer))
    assert same_bits(merged, by_peft(layer)[0])


def test_the_proof_fails_where_one_block_differs_in_one_bit(monkeypatch) -> None:
    shape = facts(256, 64, block_elements=1)
    assert len(shape["starts"]) == 4
    assert delta._proved.__wrapped__(**shape)
    genuine = delta.Factors.whole

    def nudged(product: delta.Factors) -> torch.Tensor:
        values = genuine(product)
        values[131, 5] = torch.nextafter(values[131, 5], torch.tensor(9.0))
        return values

    monkeypatch.setattr(delta.Factors, "whole", nudged)
    assert not delta._proved.__wrapped__(**shape)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 127, 128, 129, 191, 1000])
def test_blocks_cover_every_row_once_and_none_is_short(rows) -> None:
    blocks = Buffers(block_elements=1).blocks(rows, 4096, CPU)
    covered = [row for block in blocks for row in range(block.start, block.stop)]
    assert covered == list(range(rows))
    assert len(blocks) == 1 or min(block.stop - block.start for block in blocks) >= 64


@settings(max_examples=examples(30), deadline=None)
@given(rows=st.integers(1, 200), columns=st.integers(1, 200), rank=st.integers(1, 32), seed=st.integers(0, 99))
def test_the_norm_needs_no_pass_over_the_delta(rows, columns, rank, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
    exact = float((b.double() @ a.double() * 0.7).norm())
    assert LowRankUpdate(lora_a=a, lora_b=b, scaling=-0.7).delta_norms()[0] == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_norms_of_rows_are_bounded_closely(transposed) -> None:
    """As the weight stores them. The third rank cancels the first two in half of the outputs."""
    a, b = torch.randn(3, 70), torch.randn(50, 3) * 1e-20
    a[2], b[::2, 2] = a[0] + a[1], b[::2, 0]
    b[::2, :2] = -b[::2, :1]
    update = LowRankUpdate(lora_a=a, lora_b=b, scaling=-1e30, transposed=transposed)
    exact = (b.double() @ a.double() * 1e30).norm(dim=0 if transposed else 1)
    _, rows = update.delta_norms()
    assert rows.shape == exact.shape
    assert (rows >= exact).all()
    assert (rows <= exact * 1.001 + exact.max() * 1e-5).all()


def test_the_norm_of_nothing_of_nan_and_of_too_much() -> None:
    a, b = torch.randn(4, 30), torch.zeros(50, 4)
    assert LowRankUpdate(lora_a=a, lora_b=b, scaling=2.0).delta_norms()[0] == 0.0
    b[3, 1] = math.nan
    assert math.isnan(LowRankUpdate(lora_a=a, lora_b=b, scaling=2.0).delta_norms()[0])
    assert LowRankUpdate(lora_a=a, lora_b=torch.ones(50, 4), scaling=1.7e308).delta_norms()[0] == math.inf
    assert 1e200 < LowRankUpdate(lora_a=a, lora_b=torch.ones(50, 4), scaling=1e200).delta_norms()[0] < math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_factors_that_cancel_is_zero(dtype: torch.dtype) -> None:
    a, b = torch.randn(4, 30).to(dtype), torch.randn(50, 4).to(dtype)

    def norm(second: float) -> float:
        factors = {"lora_a": torch.cat((a, a * second)), "lora_b": torch.cat((b, b), 1)}
        return LowRankUpdate(**factors, scaling=3.0).delta_norms()[0]

    assert norm(-1.0) == 0.0
    left = (torch.ones((), dtype=dtype) - torch.finfo(dtype).eps * 8).item()
    exact = 3.0 * float((b.double() @ (a.double() + (a * -left).double())).norm())
    assert norm(-left) == pytest.approx(exact, rel=1e-2)


def test_a_rank_that_does_nothing_hides_no_other() -> None:
    a, b = torch.randn(4, 30), torch.randn(50, 4)
    a[0], b[:, 0], b[:, 1], a[1] = 1e9, 0.0, 1e9, 0.0
    norm = LowRankUpdate(lora_a=a, lora_b=b, scaling=1.0).delta_norms()[0]
    assert norm == pytest.approx(float((b.double() @ a.double()).norm()), rel=1e-6)


def test_an_update_knows_the_shape_of_its_weight() -> None:
    layer = tuner_layer("embedding", 24, 70, 4)
    lora_a, lora_b = factors(layer)
    update = LowRankUpdate(lora_a=lora_a, lora_b=lora_b, scaling=1.0, transposed=True)
    assert update.shape == layer.get_base_layer().weight.shape == (70, 24)
