"""Every road of the fast way against PEFT's own layer: the same bits, and true figures about them."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_gate.engine.blocks import measure_merge
from tests.engine.blocks_layers import (
    DENSE,
    QUANTIZED,
    base_values,
    by_peft,
    in_blocks,
    same_bits,
    threads,
    tuner_layer,
    whole,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = st.one_of(st.integers(1, 80), st.sampled_from([127, 128, 129, 255, 256, 257, 384, 511, 512, 513, 640]))
ROWS = st.one_of(
    st.integers(1, 80), st.integers(60, 400), st.sampled_from([255, 256, 257, 258, 259, 511, 513, 769, 1025])
)
RANKS = st.one_of(st.integers(1, 24), st.sampled_from([32, 33, 64, 65, 128, 256]))
SCALINGS = st.sampled_from([2.0, 1.0, 0.5, 16 / 3, 0.1, 32 / math.sqrt(12), -1.0, 3, 0.0])


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


@settings(max_examples=250, deadline=None)
@given(
    kind=st.sampled_from(DENSE),
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
def test_lora_has_pefts_bits(
    kind, rows, columns, rank, scaling, dtype, factor_dtype, block_elements, thread_count, seed
) -> None:
    """At one number of threads: for some odd shapes (5 x 127, rank 2) PEFT's own bits change with it."""
    with threads(thread_count):
        layer = tuner_layer(
            kind, rows, columns, rank, dtype=dtype, factor_dtype=factor_dtype, scaling=scaling, seed=seed
        )
        holds(layer, block_elements=block_elements)


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(DENSE),
    rows=ROWS,
    columns=WIDTHS,
    rank=RANKS,
    scaling=SCALINGS,
    dtype=st.sampled_from(DTYPES),
    block_elements=st.sampled_from([1, 1 << 14, 1 << 16]),
    thread_count=st.sampled_from([1, 2]),
    seed=st.integers(0, 1 << 16),
)
def test_dora_has_pefts_bits(kind, rows, columns, rank, scaling, dtype, block_elements, thread_count, seed) -> None:
    with threads(thread_count):
        layer = tuner_layer(kind, rows, columns, rank, dora=True, dtype=dtype, scaling=scaling, seed=seed)
        holds(layer, block_elements=block_elements)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(QUANTIZED),
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
