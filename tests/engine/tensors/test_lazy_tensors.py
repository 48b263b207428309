"""Tensors without values: they have them while they are filled, and whoever reads them before is found out."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from merge_gate.engine.tensors.lazy_tensors import HUGE_BYTES, LazyGroup, LazyTensors

CASTABLE = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {"matrix": (40, 33), "vector": (700,), "scalar": (), "pages": (64, 1024)}


def sources(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def cast_from(name: str, source: torch.Tensor, dtype: torch.dtype) -> LazyGroup:
    def fill(tensors: Mapping[str, torch.Tensor]) -> None:
        tensors[name].copy_(source)

    return LazyGroup(outlines={name: (source.shape, dtype)}, fill=fill)


def lazy(given_: dict[str, torch.Tensor], dtype: torch.dtype = torch.float16) -> LazyTensors:
    return LazyTensors(cast_from(name, source, dtype) for name, source in given_.items())


@given(source=st.sampled_from(CASTABLE), dtype=st.sampled_from(CASTABLE))
def test_filled_it_is_the_cast_and_afterwards_nothing(source: torch.dtype, dtype: torch.dtype) -> None:
    given_ = sources(source)
    made = lazy(given_, dtype)
    assert not made.fill_touched()
    with made.filled(made.tensors.values()):
        assert all(torch.equal(made.tensors[name], tensor.to(dtype)) for name, tensor in given_.items())
    assert not made.fill_touched()


@pytest.mark.parametrize("name", SHAPES)
def test_who_reads_it_empty_is_found_out(name: str) -> None:
    given_ = sources()
    made = lazy(given_)
    assert not made.tensors[name].flatten()[-1:].any()  # read
    assert made.fill_touched()
    assert torch.equal(made.tensors[name], given_[name].half())
    assert not made.fill_touched()
    others = [tensor for other, tensor in made.tensors.items() if other != name]
    with made.filled(others):
        pass
    assert not made.fill_touched()


def test_who_reads_it_before_it_is_filled_is_found_out() -> None:
    made = lazy(sources())
    made.tensors["matrix"].sum()
    with made.filled([made.tensors["matrix"]]):
        pass
    assert made.fill_touched()
    assert not made.fill_touched()


@pytest.mark.parametrize("touch", [lambda made: made["pages"][5].fill_(1), lambda made: made["matrix"].clone()])
def test_who_writes_to_it_or_copies_it_is_found_out(touch: Callable[[dict[str, torch.Tensor]], object]) -> None:
    made = lazy(sources())
    touch(made.tensors)
    assert made.fill_touched()


def test_it_stays_filled_as_long_as_one_thread_reads() -> None:
    given_ = sources()
    made = lazy(given_)
    meet = threading.Barrier(8)

    def read(number: int) -> bool:
        meet.wait()
        good = True
        for _ in range(200):
            with made.filled([made.tensors["matrix"], made.tensors["vector"]][: 1 + number % 2]):
                good = good and torch.equal(made.tensors["matrix"], given_["matrix"].half())
        return good

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))
    assert not made.fill_touched()


def test_the_tensors_of_a_cell_get_their_values_together() -> None:
    given_, fills = sources(), []

    def fill(tensors: Mapping[str, torch.Tensor]) -> None:
        fills.append(set(tensors))
        for name, tensor in tensors.items():
            tensor.copy_(given_[name])

    group = LazyGroup(outlines={name: (tensor.shape, tensor.dtype) for name, tensor in given_.items()}, fill=fill)
    made = LazyTensors([group])
    assert made.groups(["vector"]) == [group]
    with made.filled([made.tensors["vector"]]):
        assert all(torch.equal(made.tensors[name], tensor) for name, tensor in given_.items())
    assert not made.fill_touched()
    assert made.kept_bytes() == 0
    made.tensors["scalar"].item()
    assert made.fill_touched()
    assert made.is_kept(made.tensors["matrix"])
    assert torch.equal(made.tensors["matrix"], given_["matrix"])
    assert fills == [set(SHAPES)] * 2
    assert made.kept_bytes() >= sum(tensor.nbytes for tensor in given_.values())


def test_values_that_could_not_be_written_leave_nothing_behind() -> None:
    fails = [True]

    def fill(tensors: Mapping[str, torch.Tensor]) -> None:
        tensors["one"][:600].fill_(2)
        if fails:
            raise OSError
        tensors["one"].fill_(1)

    made = LazyTensors([LazyGroup(outlines={"one": ((5000,), torch.float32)}, fill=fill)])
    with pytest.raises(OSError), made.filled(made.tensors.values()):
        pytest.fail("it has no values")
    fails.clear()
    with made.filled(made.tensors.values()):
        assert made.tensors["one"].eq(1).all()
    assert not made.fill_touched()


def test_values_are_written_whatever_the_default_device_is() -> None:
    """PEFT makes layers under `torch.device("meta")`, and a fill may need memory of its own."""

    def fill(tensors: Mapping[str, torch.Tensor]) -> None:
        tensors["one"].copy_(torch.ones(5000))

    made = LazyTensors([LazyGroup(outlines={"one": ((5000,), torch.float32)}, fill=fill)])
    with torch.device("meta"), made.filled(made.tensors.values()):
        assert made.tensors["one"].eq(1).all()


@pytest.mark.parametrize("touched", ["small", "large", "larger", "last"])
def test_a_touch_of_a_large_tensor_is_found_in_that_tensor_alone(touched: str) -> None:
    """Large groups use huge pages, which the system makes and reports as a whole."""
    sizes = {"small": 700, "large": (5 << 20) // 4 + 3, "larger": 3 << 20, "last": 1000}
    made = LazyTensors(cast_from(name, torch.ones(size), torch.float16) for name, size in sizes.items())
    assert not made.fill_touched()
    assert not made.tensors[touched][sizes[touched] // 2].item()  # read
    assert made.fill_touched()
    assert [name for name, tensor in made.tensors.items() if made.is_kept(tensor)] == [touched]
    with made.filled(made.tensors.values()):
        assert all(tensor.eq(1).all() for tensor in made.tensors.values())
    assert not made.fill_touched()


def test_large_cells_begin_at_huge_pages() -> None:
    sizes = {"one": 700, "two": HUGE_BYTES, "three": 1, "four": HUGE_BYTES + 5, "five": 3}
    made = LazyTensors(cast_from(name, torch.ones(size), torch.bfloat16) for name, size in sizes.items())
    addresses = {name: tensor.data_ptr() for name, tensor in made.tensors.items()}
    large = [name for name, one in addresses.items() if one % HUGE_BYTES == 0 and sizes[name] >= HUGE_BYTES // 2]
    assert large == ["two", "four"]
    ends = [addresses[name] + 2 * size for name, size in sizes.items()]
    assert all(end <= start for end, start in zip(ends, list(addresses.values())[1:], strict=False))
