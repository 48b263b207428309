"""The stated error of the strength is honest: 500 right merges with the noise of each format."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gguf import GGMLQuantizationType as Type

from merge_gate.features.quantized.measurement import TensorStrength
from tests.support.quantized.fits import fitted
from tests.support.quantized.gguf_files import roundtrip
from tests.support.quantized.quantizers import QUANTIZERS

SIZE, RANK = 128, 8
OF_GGUF = {kind.name: partial(roundtrip, kind=kind) for kind in (Type.Q8_0, Type.Q5_1, Type.Q5_0, Type.Q4_1, Type.Q4_0)}
OF_OTHERS = {name: lambda values, name=name: QUANTIZERS[name](values).values() for name in QUANTIZERS}
FORMATS = OF_GGUF | OF_OTHERS


def right_merge(quantize, seed: int) -> TensorStrength:
    """A merge of a random size, structure, and dtype."""
    random = torch.Generator().manual_seed(seed)
    share = 10 ** float(torch.empty(()).uniform_(-2.5, -1, generator=random))
    base = (torch.randn(SIZE, SIZE, generator=random) * 0.02).bfloat16().float()
    delta = torch.randn(SIZE, RANK, generator=random) @ torch.randn(RANK, SIZE, generator=random)
    if seed % 4 == 0:
        delta = base * torch.randn(SIZE, 1, generator=random)
    delta *= share * base.norm() / delta.norm()
    merged = base + delta
    actual = quantize(merged.bfloat16().float() if seed % 2 else merged)
    outline = TensorStrength(name="w", kind="q", touched=True, shape=base.shape, expected_shape=base.shape)
    return fitted(outline, base, merged, actual, torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "count"), [("Q4_0", 50), *(pytest.param(name, 500, marks=pytest.mark.nightly) for name in FORMATS)]
)
def test_the_error_of_right_merges_is_honest(name: str, count: int) -> None:
    facts = [right_merge(FORMATS[name], seed) for seed in range(count)]
    within = [abs(one.strength - 1) < 2 * one.error + 0.01 for one in facts]
    share = sum(within) / count
    print(f"{name}: {share:.1%} within 2 errors + 0.01")  # noqa: T201 - the table of `pytest -s`
    assert share >= 0.93 - (0.07 if count < 100 else 0)
