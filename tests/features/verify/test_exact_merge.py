"""Orders of rounding: every honest one explains itself, and no change of a unit in the last place passes as one."""

import copy
import itertools
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_gate.engine.adapter_evidence import MergeRequest
from merge_gate.engine.blocks.delta import LowRankUpdate
from merge_gate.features.verify import exact_merge
from merge_gate.features.verify.comparison import Comparison, TensorComparison
from merge_gate.features.verify.exact_merge import ExactRows, Fit, lora_rows
from merge_gate.features.verify.tensor_findings import bias_limit
from merge_gate.files.preflight import preflight
from tests.support import methods
from tests.support.gating import Gate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]
"""A weight, the factors A and B, and the scaling."""


def layer(seed: int, dtype: torch.dtype, *, most: float = 1.0, least_size: int = 16) -> Layer:
    """A layer of some size and rank, whose delta is a thousandth to `most` of the weight. Some are one-sided."""
    generator, chosen = torch.Generator().manual_seed(seed), random.Random(seed)
    rows, columns = (chosen.choice([one for one in (16, 48, 128, 300) if one >= least_size]) for _ in range(2))
    rank, scaling = (
        chosen.choice([1, 2, 4, 8, 16, 32, 64]),
        chosen.choice([0.5, 1, 2, 1 / 3, 16 / 7, 32 / math.sqrt(12)]),
    )
    a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
    if chosen.random() < 0.3 and most == 1:
        a, b = a + 1, b.abs()
    size = math.sqrt(most * 10 ** chosen.uniform(-3, 0) * 0.02 / (scaling * math.sqrt(rank)))
    a, b = ((one * size).to(chosen.choice(DTYPES[:2])).float() for one in (a, b))
    return (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype), a, b, scaling


def deltas(a: torch.Tensor, b: torch.Tensor, scaling: float) -> Iterator[torch.Tensor]:
    """The same product in different orders."""
    one_by_one = torch.zeros(len(b), a.shape[1])
    for rank in range(len(a)):
        one_by_one += b[:, rank : rank + 1] * a[rank]
    yield (b @ a) * scaling
    yield one_by_one * scaling
    yield (b.flip(1) @ a.flip(0)) * scaling
    yield (a.T @ b.T).T * scaling
    yield (b * scaling) @ a
    yield b @ (a * scaling)
    yield (b * (scaling * 3)) @ (a / 3)
    yield (b * math.sqrt(scaling)) @ (a * math.sqrt(scaling))
    yield (b.double() @ a.double() * scaling).float()


def honest(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> Iterator[torch.Tensor]:
    for delta in deltas(a, b, scaling):
        yield weight + delta.to(weight.dtype)
        yield (weight.float() + delta).to(weight.dtype)
    yield torch.addmm(weight.float(), b, a, alpha=scaling).to(weight.dtype)
    yield (weight.double() + b.double() @ a.double() * scaling).to(weight.dtype)


def fitted(of: Layer, actual: torch.Tensor, dtype: torch.dtype | None = None) -> tuple[int, float, int]:
    """The values that no order explains, the bias as a share of the limit, and the values that are astray."""
    weight, a, b, scaling = of
    fit = Fit(dtype or weight.dtype, actual.dtype, 1.0)
    for rows in lora_rows("w", weight, LowRankUpdate(lora_a=a, lora_b=b, scaling=scaling)):
        fit.add(actual[rows.start : rows.start + len(rows.merged)], rows)
    outside, bias = fit.best()
    return outside, bias / limit_of(actual), fit.astray


def limit_of(actual: torch.Tensor) -> float:
    shape = tuple(actual.shape)
    one = TensorComparison(
        name="w", touched=True, same=False, dtype="", expected_dtype="", shape=shape, expected_shape=shape,
        numel=actual.numel(),
    )  # fmt: skip
    return bias_limit(Comparison(tensors=(one,)))


@pytest.mark.attempt("R01", "products in other orders, rounded once or twice", "rounding")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_honest_order_explains_itself(dtype: torch.dtype) -> None:
    for seed in range(10):
        of = layer(seed, dtype)
        for number, actual in enumerate(honest(*of)):
            outside, bias, astray = fitted(of, actual)
            assert (outside, astray) == (0, 0), (seed, number)
            assert bias < 1, (seed, number)


def steps(actual: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Each value moved by one unit of its last place in the direction of the sign."""
    upper, lower = (torch.nextafter(actual, torch.full_like(actual, end)) for end in (math.inf, -math.inf))
    return torch.where(signs > 0, upper, torch.where(signs < 0, lower, actual))


def _column(signs: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(signs).index_fill_(1, torch.tensor(5), -1)


def _tenth(signs: torch.Tensor) -> torch.Tensor:
    return signs * (torch.rand(signs.shape, generator=torch.Generator().manual_seed(8)) < 0.1)


PATTERNS = [
    ("V03a", "+1 unit of the last place in every value", torch.ones_like),
    ("V03b", "-1 unit in every value", lambda signs: -torch.ones_like(signs)),
    ("V03c", "±1 unit in a tenth of the values", _tenth),
    ("V03d", "±1 unit with chosen signs", lambda signs: signs),
    ("V04a", "+1 unit in every value of a row", lambda signs: -_column(signs.T).T),
    ("V04b", "-1 unit in every value of a column", _column),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("pattern", "is_everywhere"),
    [
        pytest.param(
            pattern, what.endswith("in every value"), id=what, marks=pytest.mark.attempt(number, what, "fails")
        )
        for number, what, pattern in PATTERNS
    ],
)
def test_a_change_of_one_unit_is_no_order_of_rounding(
    pattern: Callable[[torch.Tensor], torch.Tensor], is_everywhere: bool, dtype: torch.dtype
) -> None:
    for seed in range(8):
        of = layer(seed, dtype, most=0.05, least_size=128)
        signs = torch.randn(of[0].shape, generator=torch.Generator().manual_seed(seed)).sign()
        for merged in itertools.islice(honest(*of), 2):
            outside, bias, _ = fitted(of, steps(merged, pattern(signs)))
            assert outside or bias > 1, seed
            assert bias > 1 or not is_everywhere, seed


@pytest.mark.attempt("V03e", "one value off by 2 units of the last place", "imprecise")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_value_that_is_off_by_two_units_is_found(dtype: torch.dtype) -> None:
    for seed in range(8):
        of = layer(seed, dtype, most=0.05, least_size=128)
        merged = next(honest(*of))
        signs = torch.zeros(merged.numel()).index_fill_(0, merged.abs().argmax(), 1).reshape(merged.shape)
        assert fitted(of, steps(steps(merged, signs), signs))[0] == 1, seed


@pytest.mark.attempt("V03f", "every value as far off as the bound of float32 allows, to one side", "unexplained")
def test_a_change_within_float32s_bound_is_seen_by_its_signs() -> None:
    for seed in range(4):
        of = layer(seed, torch.float32, least_size=128)
        blocks = lora_rows("w", of[0], LowRankUpdate(lora_a=of[1], lora_b=of[2], scaling=of[3]))
        outside, bias, _ = fitted(of, torch.cat([rows.merged + 0.99 * rows.bound for rows in blocks]).float())
        assert outside == 0
        assert bias > 1


@pytest.mark.parametrize(("stored", "merged"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_merge_in_another_dtype_than_the_base_explains_itself(stored: torch.dtype, merged: torch.dtype) -> None:
    for seed in range(6):
        of = layer(seed, stored)
        weight, a, b, scaling = of
        delta = (b @ a) * scaling
        for actual in (
            (weight.float() + delta).to(merged),
            (weight.to(merged) + delta.to(merged)),
            (weight + delta.to(stored)).to(merged),
        ):
            assert fitted(of, actual, stored)[0] == 0
        outside, bias, _ = fitted(of, steps(actual, torch.ones_like(actual)), stored)
        assert outside or bias > 1


def test_values_off_by_factors_in_16_bits_are_near() -> None:
    for seed in range(6):
        weight, a, b, scaling = of = layer(seed, torch.bfloat16, most=0.05, least_size=128)
        delta = (b.to(torch.bfloat16).float() + b / 256) @ a.to(torch.bfloat16).float() * scaling
        actual = weight + delta.to(torch.bfloat16)
        assert fitted(of, actual)[2] == 0
        actual[3, 4] += 1
        assert fitted(of, actual)[2] == 1


def test_values_that_are_not_finite_are_left_to_others() -> None:
    of = layer(1, torch.bfloat16)
    actual = next(honest(*of))
    actual[1] = torch.nan
    assert fitted(of, actual)[0] == 0


def test_blocks_of_rows_give_what_other_blocks_give() -> None:
    weight, a, b, scaling = of = layer(2, torch.bfloat16, least_size=300)
    actual = steps(next(honest(*of)), _column(torch.ones(weight.shape)))
    halves = Fit(torch.bfloat16, torch.bfloat16, 1.0)
    for half in (slice(150), slice(150, 300)):
        (rows,) = lora_rows("w", weight[half], LowRankUpdate(lora_a=a, lora_b=b[half], scaling=scaling))
        halves.add(actual[half], rows)
    outside, bias = halves.best()
    in_blocks = fitted(of, actual)
    assert (outside, bias / limit_of(actual), halves.astray) == pytest.approx(in_blocks)
    assert in_blocks[0] > 0


# --- other methods ---------------------------------------------------------------------------------------------------

COPIED = {"ln-norm", "ln-rmsnorm", "ln-linear"}
"""PEFT puts a trained copy in the place of the layer: it adds nothing, so there is nothing to round."""

QUICK = ("lora-linear", "lora-dora", "lora-conv2d", "lora-experts", "lokr-linear", "oft-linear", "ia3-linear")


def _exact(case: methods.Case, place: Path) -> tuple[dict[str, list[ExactRows]], dict[str, torch.Tensor]]:
    """The exact merges of the tensors that a method changes, and PEFT's merge in float32."""
    base = methods.save_base(case.base, place / "base", "float32")
    model = methods.load_base(case.base, base)
    files = preflight(
        str(methods.save_adapter(case, model, place / "adapter", base_directory=base)), allow_pickle=False
    )
    loaded, merged = Gate().base(base, files, dtype="auto"), methods.merge(copy.deepcopy(model), place / "adapter")
    changed = {
        name for name in loaded.tensors if name in merged and not torch.equal(merged[name], loaded.tensors[name])
    }
    request: Any = MergeRequest(base=loaded, members=(files,))
    exact: dict[str, list[ExactRows]] = {}
    for rows in exact_merge.exact_merge(request, changed):
        exact.setdefault(rows.name, []).append(rows)
    return exact, merged


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case.name in QUICK else pytest.mark.slow) for case in methods.CASES],
    ids=lambda case: case.name,
)
def test_the_merge_of_each_method_is_explained_and_no_change(case: methods.Case, tmp_path: Path) -> None:
    exact, merged = _exact(case, tmp_path)
    assert bool(exact) is (case.name not in COPIED)
    for name, blocks in exact.items():
        for dtype, is_right in ((torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)):
            actual = merged[name].to(dtype)
            fit = Fit(torch.float32, dtype, 1.0)
            actual = actual if is_right else steps(actual, torch.ones_like(actual))
            for rows in blocks:
                fit.add(actual[rows.start : rows.start + len(rows.merged)], rows)
            outside, bias = fit.best()
            assert (outside == 0 and bias < limit_of(actual)) is is_right, (name, dtype)
