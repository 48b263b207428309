"""The factor of a delta in a quantized tensor is measured with an honest error."""

from __future__ import annotations

from functools import partial

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from merge_gate.features.quantized.measurement import TensorStrength
from tests.support.quantized.fits import fitted

ROWS, COLUMNS = 128, 128


def quantized(values: torch.Tensor, kind: Type) -> torch.Tensor:
    packed = gguf.quants.quantize(values.numpy(), kind)
    return torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(packed, kind)))


def base_and_delta(share: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in bfloat16, and a delta of rank 8 whose norm is this share of the weight's."""
    random = torch.Generator().manual_seed(seed)
    base = (torch.randn(ROWS, COLUMNS, generator=random) * 0.02).bfloat16().float()
    delta = torch.randn(ROWS, 8, generator=random) @ torch.randn(8, COLUMNS, generator=random)
    return base, delta * (share * base.norm() / delta.norm())


def measured(
    base: torch.Tensor, delta: torch.Tensor | float, actual: torch.Tensor, kind: Type | None = None
) -> TensorStrength:
    shape = (ROWS, COLUMNS)
    outline = TensorStrength(name="weight", kind="Q4_0", touched=True, shape=shape, expected_shape=shape)
    again = None if kind is None else partial(quantized, kind=kind)
    return fitted(outline, base, base + delta, actual, torch.bfloat16, again)


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q5_0, Type.Q4_0], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("share", "times"), [(0.1, 1), (0.03, 1), (0.03, 0), (0.03, 2), (0.03, -1)])
def test_the_factor_is_within_its_error(kind: Type, dtype: torch.dtype, share: float, times: float) -> None:
    base, delta = base_and_delta(share)
    facts = measured(base, delta, quantized((base + times * delta).to(dtype).float(), kind))
    assert abs(facts.strength - times) < 3 * facts.error + 0.01 * max(1, abs(times))
    assert facts.noise / facts.delta < 10


def test_a_fitted_scale_of_the_weight_is_no_part_of_the_factor() -> None:
    base, _ = base_and_delta(0.1)
    delta = 0.1 * base.roll(1, 0) + 0.1 * base
    facts = measured(base, delta, 0.98 * (base + delta))
    assert facts.strength == pytest.approx(1, abs=1e-3)
    assert facts.scale == pytest.approx(0.98, abs=1e-3)


def test_a_parallel_delta_has_no_factor() -> None:
    base, _ = base_and_delta(0.1)
    assert measured(base, 0.125 * base, 1.125 * base).error == float("inf")


def test_noise_that_is_alike_within_rows_has_a_larger_error() -> None:
    base, delta = base_and_delta(0.1)
    random = torch.Generator().manual_seed(1)
    rows = torch.randn(ROWS, 1, generator=random)
    noise = base * rows * 0.1
    white = noise[:, torch.randperm(COLUMNS, generator=random)]
    column = base * torch.randn(ROWS, 1, generator=random) * 0.1
    like_rows = measured(base, column, base + column + noise)
    like_white = measured(base, column, base + column + white)
    assert like_rows.error > 3 * like_white.error
    assert abs(like_rows.strength - 1) < 3 * like_rows.error
    assert measured(base, delta, base + delta).error < 1e-3


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda base, delta: quantized(quantized(base, Type.Q4_0) + delta, Type.Q4_0), True),
        (lambda base, delta: quantized(base + delta, Type.Q4_0), False),
        (lambda base, delta: quantized(base + 0.5 * delta, Type.Q4_0), False),
        (lambda base, _: quantized(base, Type.Q4_0), False),
    ],
)
def test_a_merge_into_codes_is_recognized(make, expected: bool) -> None:
    base, delta = base_and_delta(0.03)
    actual = make(base, delta)
    facts = measured(base, delta, actual, Type.Q4_0)
    assert facts.is_erased is expected
    assert facts.own_noise == pytest.approx(facts.noise, rel=0.1)


def test_the_bend_of_a_merge_into_codes_needs_no_quantizer() -> None:
    base, delta = base_and_delta(0.1)
    codes = measured(base, delta, quantized(quantized(base, Type.Q4_0) + delta, Type.Q4_0))
    half = measured(base, delta, quantized(base + 0.5 * delta, Type.Q4_0))
    assert codes.bend > 5 > abs(half.bend)


def test_values_that_are_not_finite_are_counted() -> None:
    base, delta = base_and_delta(0.1)
    actual = base.clone()
    actual[0, :3] = torch.nan
    assert measured(base, delta, actual).nonfinite == 3
    assert measured(base, 0.0, actual).nonfinite == 3


def test_a_rotated_tensor_is_recognized() -> None:
    base, _ = base_and_delta(0.1)
    base *= torch.linspace(0.5, 2, ROWS)[:, None]
    rotation = torch.linalg.qr(torch.randn(COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(2))).Q
    assert measured(base, 0.0, base @ rotation).rotated
    assert not measured(base, 0.0, base_and_delta(0.1, seed=5)[0]).rotated
    assert not measured(base, 0.0, base + 0.1 * base.flip(1)).rotated


def test_a_wide_tensor_keeps_its_shuffles() -> None:
    """A block of 16,384 columns has 8 rows. The rows that are shuffled come from several blocks."""
    random = torch.Generator().manual_seed(0)
    shape = (160, 16_384)
    base = (torch.randn(shape, generator=random) * 0.02).bfloat16().float()
    delta = torch.randn(shape[0], 2, generator=random) @ torch.randn(2, shape[1], generator=random) * 1e-3
    noise = 1e-3 * torch.randn(shape, generator=random)
    alike = torch.randn(shape[0], 2, generator=random) @ (
        torch.randn(2, 2, generator=random) @ torch.linalg.pinv(delta[:2]).T
    )
    alike *= noise.norm() / alike.norm()
    outline = TensorStrength(name="w", kind="q", touched=True, shape=shape, expected_shape=shape)
    errors = {
        block: [
            fitted(outline, base, base + delta, base + delta + rest, torch.bfloat16, None, block).error
            for rest in (noise, alike)
        ]
        for block in (8, 160)
    }
    for white, of_rows in errors.values():
        assert of_rows > 5 * white
    assert errors[8][1] == pytest.approx(errors[160][1], rel=0.5)


@pytest.mark.parametrize("block", [1, 17, 128])
def test_blocks_change_nothing(block: int) -> None:
    base, delta = base_and_delta(0.03)
    actual = quantized(base + delta, Type.Q4_0)
    outline = TensorStrength(name="w", kind="q", touched=True, shape=base.shape, expected_shape=base.shape)
    again = partial(quantized, kind=Type.Q4_0)
    own, whole = (fitted(outline, base, base + delta, actual, torch.bfloat16, again, size) for size in (block, ROWS))
    for name in ("strength", "error", "scale", "noise", "own_noise", "loudest", "uneven", "bend"):
        assert getattr(own, name) == pytest.approx(getattr(whole, name), rel=1e-3), name
    assert (own.is_erased, own.changed) == (whole.is_erased, whole.changed)
