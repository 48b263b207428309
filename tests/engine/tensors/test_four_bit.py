"""Values in 4 bits, block by block, against bitsandbytes' own whole tensors: every byte and every scale."""

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_gate.engine.tensors import quantized
from tests.support.properties import examples

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TYPES = ("nf4", "fp4")


def weight(rows: int = 700, columns: int = 640, dtype: torch.dtype = torch.bfloat16, size: float = 0.02):
    """Of several blocks, the last of which is not full."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).mul(size).to(dtype)


def on_loading(values: torch.Tensor, quant_type: str = "nf4", **options) -> bnb.nn.Params4bit:
    """As transformers makes it of a base's weight."""
    return bnb.nn.Params4bit(values, requires_grad=False, quant_type=quant_type, **options).to("cpu")


def same(ours: bnb.nn.Params4bit, theirs: bnb.nn.Params4bit) -> bool:
    """Whether all that a weight is made of is the same."""
    mine, other = ours.quant_state.as_dict(), theirs.quant_state.as_dict()
    tensors = [name for name, value in other.items() if isinstance(value, torch.Tensor)]
    equal = all(torch.equal(mine[name], other[name]) for name in tensors)
    rest = {name: value for name, value in other.items() if name not in tensors}
    return (
        equal
        and torch.equal(ours.data.view(torch.uint8), theirs.data.view(torch.uint8))
        and rest == {name: mine[name] for name in rest}
    )


@settings(max_examples=examples(80), deadline=None)
@given(
    quant_type=st.sampled_from(TYPES),
    dtype=st.sampled_from(DTYPES),
    blocksize=st.sampled_from([32, 64, 256]),
    size=st.sampled_from([1e-44, 1e-38, 1e-20, 1e-6, 0.02, 1.0, 1e3, 1e30]),
    sparse=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
def test_a_block_has_the_bits_of_bitsandbytes(quant_type, dtype, blocksize, size, sparse, seed) -> None:
    values = torch.randn(24, 256, generator=torch.Generator().manual_seed(seed)).mul(size)
    if sparse:
        values[::3], values[1::3, ::2] = 0.0, -0.0
    values = values.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    packed, scales = quantized.quantized(values, blocksize, quant_type)
    expected, state = bnb.functional.quantize_4bit(values, blocksize=blocksize, quant_type=quant_type)
    assert torch.equal(packed, expected)
    assert torch.equal(scales, state.absmax)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("shape", [(700, 640), (3, 64), (1, 5), (7, 65)])
def test_a_weight_of_a_base_has_the_bits_of_bitsandbytes(shape, quant_type, dtype) -> None:
    values = weight(*shape, dtype=dtype)
    theirs = on_loading(values.clone(), quant_type)
    with quantized.loading_in_blocks():
        ours = on_loading(values.clone(), quant_type)
    assert same(ours, theirs)


@pytest.mark.parametrize("options", [{"compress_statistics": True}, {"quant_storage": torch.bfloat16}])
def test_what_blocks_do_not_make_bitsandbytes_makes(options) -> None:
    theirs = on_loading(weight(), **options)
    with quantized.loading_in_blocks():
        ours = on_loading(weight(), **options)
    assert same(ours, theirs)


def test_a_weight_of_a_base_is_quantised_in_blocks(monkeypatch) -> None:
    """Else all of this is for nothing."""
    sizes = []
    own = quantized.quantized
    monkeypatch.setattr(quantized, "quantized", lambda values, *rest: sizes.append(len(values)) or own(values, *rest))
    with quantized.loading_in_blocks():
        on_loading(weight(), compress_statistics=False)
    assert sorted(sizes) == [448_000 - quantized.BLOCK, quantized.BLOCK]


def test_afterwards_bitsandbytes_is_as_it_was() -> None:
    own = bnb.functional.quantize_4bit
    with quantized.loading_in_blocks():
        assert bnb.functional.quantize_4bit is not own
        with pytest.raises(ValueError, match="blocksize"):
            on_loading(weight(), blocksize=7)
    assert bnb.functional.quantize_4bit is own


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_left_to_bitsandbytes(broken) -> None:
    values = weight()
    values[5, 7] = broken
    assert quantized.quantized(values[:8], 64, "nf4") is None
    theirs = on_loading(values.clone())
    with quantized.loading_in_blocks():
        ours = on_loading(values.clone())
    assert torch.equal(ours.data, theirs.data)
    assert torch.equal(ours.quant_state.absmax.view(torch.int32), theirs.quant_state.absmax.view(torch.int32))


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_this_bitsandbytes_quantises_as_it_is_assumed(quant_type, dtype) -> None:
    """Else it does so itself: right, and four times slower."""
    assert quantized._proved(64, quant_type, dtype)


def test_another_bitsandbytes_is_found_out(monkeypatch) -> None:
    """By the proof; and where that would not do, by the first values of a weight."""

    def another(values, **options):
        packed, state = own(values, **options)
        packed[0] ^= 1
        return packed, state

    own = bnb.functional.quantize_4bit
    assert quantized._proved(64, "nf4", weight().dtype)  # kept for the process: not the result on `another`
    monkeypatch.setattr(quantized, "own_quantize_4bit", lambda: another)
    assert not quantized._proved.__wrapped__(64, "nf4", torch.bfloat16)
    assert quantized._in_blocks(weight(), quant_type="nf4") is None
