"""Each figure of `measure` against numpy's count of the same elements, in every dtype and layout."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from merge_gate.engine.tensors import measure as module
from merge_gate.engine.tensors.measure import (
    distance,
    dtype_max,
    dtype_name,
    joined,
    measure,
    same_bits,
    same_values,
    unchanged_fraction,
)
from merge_gate.records.measured import TensorStats
from merge_gate.records.refusals import CannotJudge
from tests.support.properties import examples

NARROW = tuple(getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, name))
REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64, *NARROW)
WHOLE = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64
)  # fmt: skip
SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -2.5, 448.0, -448.0)
CHUNK = 7


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of seven elements: tensors of a few dozen cross many of their boundaries."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", CHUNK)


def truth(tensor: torch.Tensor) -> dict[str, object]:
    """What a person would count, element by element, in float64."""
    wide = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    values = wide.to(torch.float32).to(torch.float64).numpy() if wide.dtype is not torch.float64 else wide.numpy()
    finite = values[np.isfinite(values)]
    bad = np.argwhere(~np.isfinite(values))
    return {
        "nan": int(np.isnan(values).sum()),
        "posinf": int(np.isposinf(values).sum()),
        "neginf": int(np.isneginf(values).sum()),
        "minimum": float(finite.min()) if finite.size else None,
        "maximum": float(finite.max()) if finite.size else None,
        "first_index": tuple(map(int, bad[0])) if len(bad) else None,
    }


def told(stats: TensorStats) -> dict[str, object]:
    return {name: getattr(stats, name) for name in ("nan", "posinf", "neginf", "minimum", "maximum", "first_index")}


def agrees(tensor: torch.Tensor) -> TensorStats:
    stats = measure(tensor, "t")
    assert told(stats) == truth(tensor)
    assert (stats.name, stats.dtype, stats.shape, stats.numel) == (
        "t",
        str(tensor.dtype).removeprefix("torch."),
        tuple(tensor.shape),
        tensor.numel(),
    )
    assert stats.finite == (not (stats.nan or stats.posinf or stats.neginf))
    return stats


shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@st.composite
def tensors(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...]) -> torch.Tensor:
    """Any shape; most elements ordinary, some special; some tensors seen through a stride, a slice or a transpose."""
    shape = draw(shapes)
    dtype = draw(st.sampled_from(dtypes))
    count = math.prod(shape)
    ordinary = st.floats(-100, 100, width=16)
    element = draw(st.sampled_from([ordinary, st.sampled_from(SPECIAL), st.one_of(ordinary, st.sampled_from(SPECIAL))]))
    values = draw(st.lists(element, min_size=count, max_size=count))
    tensor = torch.tensor(values, dtype=torch.float64).reshape(shape).to(dtype)
    look = draw(st.sampled_from(["plain", "transposed", "every other", "reversed slice"]))
    if look == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(0, -1)
    if look == "every other" and tensor.dim():
        return tensor[::2]
    if look == "reversed slice" and tensor.dim():
        return tensor[1:]
    return tensor


@given(tensors(REAL), st.data())
def test_the_figures_of_rows_are_those_of_the_tensor(tensor: torch.Tensor, data: st.DataObject) -> None:
    assume(tensor.dim() and len(tensor))
    cuts = data.draw(st.sets(st.integers(1, len(tensor) - 1))) if len(tensor) > 1 else ()
    starts = [0, *sorted(cuts)]
    parts = [(start, measure(tensor[start:end], "t")) for start, end in zip(starts, [*starts[1:], None], strict=True)]
    assert joined(parts) == measure(tensor, "t")


@settings(max_examples=examples(400), deadline=None)
@given(tensors(REAL))
def test_every_figure_is_what_a_naive_count_gives(tensor: torch.Tensor) -> None:
    agrees(tensor)


@settings(max_examples=examples(60), deadline=None)
@given(tensors((torch.float32, torch.float64)), tensors((torch.float32, torch.float64)))
def test_a_complex_tensor_is_as_finite_as_its_parts(real: torch.Tensor, imaginary: torch.Tensor) -> None:
    parts = torch.stack([real.reshape(-1).to(torch.float64), real.reshape(-1).to(torch.float64)], dim=-1)
    if imaginary.numel() >= real.numel():
        parts[:, 1] = imaginary.reshape(-1)[: real.numel()].to(torch.float64)
    tensor = torch.view_as_complex(parts)
    stats = measure(tensor, "t")
    expected = truth(tensor)
    assert told(stats) == expected
    assert measure(tensor.conj(), "t").nan == stats.nan


@pytest.mark.parametrize("dtype", WHOLE, ids=dtype_name)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5, 4), (CHUNK * 3 + 1,)], ids=str)
def test_whole_numbers_are_finite_and_have_extremes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    stats = agrees(tensor)
    assert stats.finite


@pytest.mark.parametrize("dtype", [dtype for dtype in REAL if dtype is not NARROW[0]], ids=dtype_name)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("index", [0, CHUNK - 1, CHUNK, 2 * CHUNK, 5 * CHUNK + 2], ids=str)
def test_one_bad_element_is_found_wherever_it_is(dtype: torch.dtype, value: float, index: int) -> None:
    tensor = torch.linspace(-1, 1, 5 * CHUNK + 3, dtype=torch.float64)
    tensor[index] = value
    stats = agrees(tensor.to(dtype))
    assert not stats.finite
    assert stats.first_index == (index,)
    assert stats.nan + stats.posinf + stats.neginf == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=dtype_name)
def test_a_nan_is_a_nan_whatever_its_payload_and_sign(dtype: torch.dtype) -> None:
    size = torch.finfo(dtype).bits // 8
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    quiet = torch.tensor([math.nan], dtype=dtype).view(integer)
    infinite = torch.tensor([math.inf], dtype=dtype).view(integer)
    odd = torch.cat([quiet, quiet | 1, infinite | 1, quiet | torch.iinfo(integer).min]).view(dtype)
    stats = measure(torch.cat([torch.zeros(CHUNK, dtype=dtype), odd]), "t")
    assert (stats.nan, stats.posinf, stats.neginf) == (4, 0, 0)
    assert stats.first_index == (CHUNK,)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_tensor_without_a_finite_element_has_no_extremes(value: float) -> None:
    stats = agrees(torch.full((4, 5), value))
    assert (stats.minimum, stats.maximum, stats.max_abs) == (None, None, 0.0)
    assert stats.first_index == (0, 0)


def test_a_number_that_is_not_a_tensor_of_numbers_is_refused() -> None:
    with pytest.raises(CannotJudge, match=r"tensor_without_values.*'name': 'layer\.weight'"):
        measure(torch.empty(3, device="meta"), "layer.weight")


def test_a_parameter_and_a_sparse_tensor_are_measured_as_tensors() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, math.nan, -3.0]))
    agrees(parameter.detach())
    assert measure(parameter, "t").nan == 1
    stats = measure(torch.tensor([[0.0, math.inf], [2.0, 0.0]]).to_sparse(), "t")
    assert (stats.posinf, stats.minimum, stats.maximum, stats.first_index) == (1, 0.0, 2.0, (0, 1))


def test_measuring_changes_nothing() -> None:
    tensor = torch.tensor([1.0, math.nan, -0.0])
    before = tensor.view(torch.int32).clone()
    measure(tensor, "t")
    assert torch.equal(tensor.view(torch.int32), before)


@pytest.mark.parametrize("dtype", [*REAL, *WHOLE], ids=dtype_name)
def test_the_largest_value_of_a_dtype(dtype: torch.dtype) -> None:
    assert dtype_max(dtype) == (torch.finfo(dtype).max if dtype.is_floating_point else math.inf)


def test_bits_tell_zero_from_minus_zero_and_nan_equals_itself() -> None:
    nan = torch.tensor([math.nan, 0.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float16))
    assert not same_bits(torch.zeros(2), torch.zeros(3))


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("starts", [(0, 0), (8, 0), (1, 1), (0, 3)])
@pytest.mark.parametrize("length", [1, 7, 8, 16])
def test_a_bit_that_differs_is_found_wherever_the_tensors_begin(length: int, starts: tuple[int, int], dtype) -> None:
    """Several values are compared at once where both of them begin and end with a word."""
    values = torch.arange(1, length + 1, dtype=torch.float32).to(dtype)
    left, right = (torch.cat((torch.zeros(start), values.float())).to(dtype)[start:] for start in starts)
    assert same_bits(left, right)
    assert same_values(left, right)
    for place in range(length):
        other = torch.cat((torch.zeros(starts[1]), values.float())).to(dtype)[starts[1] :]
        other[place] = -1.0
        assert not same_bits(left, other)
        assert not same_values(left, other)


def test_values_are_the_same_where_a_zero_has_another_sign() -> None:
    left, right = torch.tensor([0.0, 1.0, math.nan, 2.0]), torch.tensor([-0.0, 1.0, math.nan, 2.0])
    assert same_values(left, right)
    assert not same_values(left, -right)


@settings(max_examples=examples(100), deadline=None)
@given(tensors((torch.float32, torch.bfloat16)), st.data())
def test_the_share_of_unchanged_elements_is_counted(left: torch.Tensor, data: st.DataObject) -> None:
    right = left.clone(memory_format=torch.contiguous_format)
    flat = right.view(-1)
    places = data.draw(st.sets(st.integers(0, max(left.numel() - 1, 0)), max_size=left.numel()))
    for place in places:
        flat[place] = 7.0 if flat[place] != 7.0 else 8.0
    expected = 1.0 if not left.numel() else 1 - len(places) / left.numel()
    assert unchanged_fraction(left, right) == pytest.approx(expected)
    assert same_bits(left, right) == (not places)


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40), st.data())
def test_the_distance_is_the_norm_of_the_difference(values: list[float], data: st.DataObject) -> None:
    others = data.draw(st.lists(st.floats(-1e4, 1e4, width=32), min_size=len(values), max_size=len(values)))
    left, right = (torch.tensor(numbers, dtype=torch.float32) for numbers in (values, others))
    difference = (left - right).to(torch.float64).numpy()
    assert distance(left, right) == pytest.approx(float(np.linalg.norm(difference)))
    assert distance(left) == pytest.approx(float(np.linalg.norm(left.to(torch.float64).numpy())))


def test_a_distance_to_nan_is_no_number() -> None:
    assert math.isnan(distance(torch.tensor([math.nan, 1.0]), torch.zeros(2)))
