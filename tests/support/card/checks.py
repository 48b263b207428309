"""What the simulated card does as a card does, checked from inside of a process that has two of them.

In: nothing. Out: `python -m tests.support.card.checks` prints the failures of all checks as JSON, an empty text for a
check that passed. tests/card/test_simulation.py starts it once.

1. Mixes of devices that have to raise. `MIXES`
2. What no merge of the fleets would show: random numbers, TF32, memory. `check`
"""

import json
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

Mix = Callable[[Tensor, Tensor], Any]
ONE_DEVICE = "same device"


def _rows(of: Tensor) -> Tensor:
    return torch.zeros(1, 4, dtype=torch.long, device=of.device)


MIXES: dict[str, tuple[Mix, str]] = {
    "add": (lambda c, g: c + g, ONE_DEVICE),
    "add_": (lambda c, g: g.add_(c), ONE_DEVICE),
    "add_ to the CPU": (lambda c, g: c.add_(g), ONE_DEVICE),
    "mul by one element": (lambda c, g: g * torch.ones(1), ONE_DEVICE),
    "a scalar of the card in an operator of the CPU": (lambda c, g: c * g[0, 0], ONE_DEVICE),
    "mm": (lambda c, g: c @ g.T, ONE_DEVICE),
    "mm, the other side": (lambda c, g: g @ c.T, ONE_DEVICE),
    "mm out=": (lambda c, g: torch.mm(g, g.T, out=torch.empty(3, 3)), ""),
    "bmm": (lambda c, g: torch.bmm(g[None], c.T[None]), ONE_DEVICE),
    "addmm": (lambda c, g: torch.addmm(torch.ones(3, 3), g, g.T), ONE_DEVICE),
    "linear": (lambda c, g: functional.linear(g, torch.ones(2, 4)), ONE_DEVICE),
    "linear with a bias": (lambda c, g: functional.linear(g, g[:2], torch.ones(2)), ONE_DEVICE),
    "kron": (lambda c, g: torch.kron(g, c), ONE_DEVICE),
    "einsum": (lambda c, g: torch.einsum("ij,kj->ik", g, c), ONE_DEVICE),
    "conv1d": (lambda c, g: torch.conv1d(g[None], torch.ones(1, 3, 2)), ONE_DEVICE),
    "layer_norm": (lambda c, g: functional.layer_norm(g, (4,), torch.ones(4)), ONE_DEVICE),
    "attention": (
        lambda c, g: functional.scaled_dot_product_attention(g[None, None], c[None, None], g[None, None]),
        ONE_DEVICE,
    ),
    "cat": (lambda c, g: torch.cat([c, g]), ONE_DEVICE),
    "stack": (lambda c, g: torch.stack([g, c]), ONE_DEVICE),
    "where, condition": (lambda c, g: torch.where(c > 0, g, g), ONE_DEVICE),
    "where, value": (lambda c, g: torch.where(g > 0, g, c), ONE_DEVICE),
    "lerp": (lambda c, g: torch.lerp(g, c, 0.5), ONE_DEVICE),
    "equal": (torch.equal, ""),
    "allclose": (torch.allclose, ""),
    "isclose": (lambda c, g: torch.isclose(g, c), ""),
    "out=": (lambda c, g: torch.add(g, g, out=torch.empty(3, 4)), ""),
    "embedding": (lambda c, g: functional.embedding(torch.tensor([1]), g), ONE_DEVICE),
    "gather": (lambda c, g: g.gather(0, _rows(c)), ONE_DEVICE),
    "index_select": (lambda c, g: g.index_select(0, torch.tensor([0])), ONE_DEVICE),
    "scatter_": (lambda c, g: g.scatter_(0, _rows(c), 1.0), ONE_DEVICE),
    "scatter_add_": (lambda c, g: g.scatter_add_(0, _rows(g), c), ONE_DEVICE),
    "index_copy_": (lambda c, g: g.index_copy_(0, torch.tensor([0], device="cuda"), c[:1]), ONE_DEVICE),
    "index_add_": (lambda c, g: g.index_add_(0, torch.tensor([0]), g[:1]), ONE_DEVICE),
    "index_put_ values": (lambda c, g: g.__setitem__(torch.tensor([0, 1]), c[:2]), ""),
    "the CPU's tensor by indices of the card": (lambda c, g: c[torch.tensor([0], device="cuda")], ""),
    "masked_fill": (lambda c, g: g.masked_fill(c > 0, 0.0), ONE_DEVICE),
    "masked_select": (lambda c, g: g.masked_select(c > 0), ONE_DEVICE),
    "two cards": (lambda c, g: g + c.to("cuda:1"), ONE_DEVICE),
    "a generator of the CPU": (lambda c, g: g.normal_(generator=torch.Generator()), "Expected a 'cuda' device type"),
    "numpy": (lambda c, g: g.numpy(), "can't convert cuda"),
    "an array": (lambda c, g: np.asarray(g), "can't convert cuda"),
    "a card that is not there": (lambda c, g: torch.ones(1, device="cuda:2"), "invalid device ordinal"),
}
"""Each gets the same values on the CPU and on the card, and has to raise an error with these words."""

CHECKS: dict[str, Callable[[Tensor, Tensor], object]] = {}


def check(function: Callable[[Tensor, Tensor], object]) -> Callable[[Tensor, Tensor], object]:
    """Register a check. It gets the same values on the CPU and on the card, and raises if it fails."""
    CHECKS[function.__name__.replace("_", " ")] = function
    return function


@check
def cards_exchange_copies(c: Tensor, g: Tensor) -> None:
    other = g.to("cuda:1")
    assert (other.device.index, torch.equal(other.cpu(), c)) == (1, True)
    assert (other + 1).device.index == 1
    with torch.cuda.device(1):
        assert torch.zeros(1, device="cuda").device.index == 1
    assert torch.zeros(1, device="cuda").device.index == 0


@check
def random_numbers_are_the_cards_own(c: Tensor, g: Tensor) -> None:
    before, of_the_card = torch.get_rng_state(), torch.cuda.get_rng_state()
    torch.rand(4, device="cuda")
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(of_the_card, torch.cuda.get_rng_state())
    torch.rand(4)
    assert not torch.equal(before, torch.get_rng_state())


@check
def the_state_of_random_numbers_is_restored(c: Tensor, g: Tensor) -> None:
    for card in (0, 1):
        state = torch.cuda.get_rng_state(card)
        first = torch.randn(8, device=f"cuda:{card}")
        assert not torch.equal(torch.randn(8, device=f"cuda:{card}"), first)
        torch.cuda.set_rng_state(state, card)
        assert torch.equal(torch.randn(8, device=f"cuda:{card}"), first)


@check
def each_card_draws_from_its_own_generator(c: Tensor, g: Tensor) -> None:
    state = torch.cuda.get_rng_state(1)
    torch.rand(4, device="cuda:0")
    assert torch.equal(state, torch.cuda.get_rng_state(1))
    torch.cuda.manual_seed_all(5)
    assert torch.equal(torch.cuda.get_rng_state(0), torch.cuda.get_rng_state(1))


@check
def seeds_and_generators_are_taken(c: Tensor, g: Tensor) -> None:
    torch.manual_seed(3)  # of all cards, too
    first = torch.randn(4, device="cuda")
    torch.manual_seed(3)
    assert torch.equal(torch.randn(4, device="cuda"), first)
    own = torch.Generator("cuda").manual_seed(3)
    assert torch.equal(torch.randn(4, device="cuda", generator=own), first)
    with torch.random.fork_rng(devices=[0]):
        torch.randn(4, device="cuda")
    assert own.device.type == "cuda"


@check
def tf32_rounds_what_the_flags_allow(c: Tensor, g: Tensor) -> None:
    exact = torch.linspace(0.1, 0.9, 12).view(3, 4)
    factors = exact.to("cuda")
    kernel = torch.linspace(0.3, 0.7, 6).view(1, 3, 2)
    backends = torch.backends
    saved = backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32
    try:
        assert saved == (False, True), "torch's defaults"
        for matmul, convolution in ((False, True), (True, False)):
            backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32 = matmul, convolution
            assert torch.equal((factors @ factors.T).cpu(), exact @ exact.T) is not matmul
            convolved = torch.conv1d(factors[None], kernel.to("cuda")).cpu()
            assert torch.allclose(convolved, torch.conv1d(exact[None], kernel), rtol=1e-6) is not convolution
            torch.testing.assert_close(convolved, torch.conv1d(exact[None], kernel), rtol=1e-2, atol=1e-2)
    finally:
        backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32 = saved


@check
def memory_is_counted(c: Tensor, g: Tensor) -> None:
    free, total = torch.cuda.mem_get_info()
    block = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
    assert torch.cuda.mem_get_info() == (free - block.nbytes, total)
    assert torch.cuda.mem_get_info(1) == (total, total)
    del block
    assert torch.cuda.mem_get_info() == (free, total)


@check
def a_full_card_raises_and_recovers(c: Tensor, g: Tensor) -> None:
    _, total = torch.cuda.mem_get_info()
    error = _error(lambda: torch.empty(total, dtype=torch.uint8, device="cuda"))
    assert isinstance(error, torch.OutOfMemoryError), error
    assert torch.equal((g + 1).cpu(), c + 1)


@check
def the_cards_are_named(c: Tensor, g: Tensor) -> None:
    assert (torch.cuda.is_available(), torch.cuda.device_count()) == (True, 2)
    assert "imulated" in torch.cuda.get_device_name(1)
    assert torch.cuda.get_device_properties(0).total_memory == torch.cuda.mem_get_info(0)[1] == 1 << 30


@check
def threads_compute(c: Tensor, g: Tensor) -> None:
    with ThreadPoolExecutor(2) as pool:
        errors = [*pool.map(lambda _: _error(lambda: c + g), range(8))]
        assert all(ONE_DEVICE in str(error) for error in errors)
        assert all(torch.equal(made.cpu(), c + 1) for made in pool.map(lambda _: g + 1, range(8)))


def _error(function: Callable[[], object]) -> Exception | None:
    try:
        function()
    except Exception as error:  # noqa: BLE001 - any error is the answer
        return error
    return None


def _failure_of_mix(mix: Mix, words: str, c: Tensor, g: Tensor) -> str:
    error = _error(lambda: mix(c, g))
    if error is None:
        return "nothing was raised"
    return "" if words in str(error) else f"got {error!r}, expected {words!r}"


def _failure_of_check(function: Callable[[Tensor, Tensor], object], c: Tensor, g: Tensor) -> str:
    error = _error(lambda: function(c, g))
    return "" if error is None else f"{type(error).__name__}: {error}"


def main() -> None:
    warnings.simplefilter("ignore")

    def values() -> tuple[Tensor, Tensor]:
        cpu = torch.arange(12.0).view(3, 4)
        return cpu, cpu.to("cuda")

    failures = {name: _failure_of_mix(mix, words, *values()) for name, (mix, words) in MIXES.items()}
    failures |= {name: _failure_of_check(function, *values()) for name, function in CHECKS.items()}
    json.dump(failures, sys.stdout)


if __name__ == "__main__":
    main()
