"""What the simulated card does as a card does, checked from inside of a process that has two of them.

In: nothing. Out: `python -m tests.support.card.checks` prints the failures of all checks as JSON, an empty text for a
check that passed. tests/card/test_simulation.py starts it once.

1. Mixes of devices that have to raise.          `MIXES`
2. Places of results, copies, and random numbers. `check`
3. PEFT's merge, against the CPU's bits.
"""

from __future__ import annotations

import copy
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
def scalars_of_the_cpu_are_taken(c: Tensor, g: Tensor) -> None:
    assert (g * torch.tensor(2.0)).is_cuda
    assert torch.where(g > 3, g, torch.tensor(0.0)).is_cuda


@check
def indices_of_the_cpu_are_taken(c: Tensor, g: Tensor) -> None:
    assert g[torch.tensor([0, 2])].is_cuda
    assert g[c > 5].shape == (6,)


@check
def values_reach_python(c: Tensor, g: Tensor) -> None:
    two = torch.tensor(2.0, device="cuda")
    assert (g[0, 1].item(), g[0].tolist(), bool(two), float(two), int(two)) == (1.0, [0, 1, 2, 3], True, 2.0, 2)


@check
def copies_go_both_ways(c: Tensor, g: Tensor) -> None:
    assert torch.equal(g.cpu(), c)
    assert torch.equal(c.to("cuda").to("cpu"), c)
    assert g.to(torch.float64).is_cuda
    assert torch.equal(torch.zeros(3, 4).copy_(g), c)
    assert torch.equal(torch.zeros(3, 4, dtype=torch.bfloat16, device="cuda").copy_(c).cpu(), c.bfloat16())
    rows = torch.zeros(3, 4)
    rows[1:3].copy_(g[1:3])
    assert torch.equal(rows[1:], c[1:])


@check
def cards_exchange_copies(c: Tensor, g: Tensor) -> None:
    other = g.to("cuda:1")
    assert (other.device.index, torch.equal(other.cpu(), c)) == (1, True)
    assert (other + 1).device.index == 1
    with torch.cuda.device(1):
        assert torch.zeros(1, device="cuda").device.index == 1
    assert torch.zeros(1, device="cuda").device.index == 0


@check
def made_tensors_are_on_the_device_of_the_block(c: Tensor, g: Tensor) -> None:
    with torch.device("cuda"):
        assert torch.zeros(2).is_cuda
        assert torch.arange(3).is_cuda
        assert torch.nn.Linear(2, 2).weight.is_cuda


@check
def tensors_like_others_are_on_their_device(c: Tensor, g: Tensor) -> None:
    makers = (torch.zeros_like, torch.ones_like, torch.empty_like, torch.rand_like)
    assert {make(g).device for make in makers} == {g.device}
    assert g.new_zeros(2).device == g.device


@check
def views_share_memory(c: Tensor, g: Tensor) -> None:
    g[1:, ::2].mul_(2)
    assert torch.equal(g.cpu()[1:, ::2], c[1:, ::2] * 2)
    assert torch.equal(g.cpu()[0], c[0])


@check
def shapes_change(c: Tensor, g: Tensor) -> None:
    assert torch.equal(g.T.cpu(), c.T)
    assert torch.equal(g.view(torch.int32).cpu(), c.view(torch.int32))
    assert torch.equal(g.expand(2, 3, 4).reshape(6, 4).cpu(), c.repeat(2, 1))
    assert torch.equal(g.permute(1, 0).contiguous().cpu(), c.T)


@check
def reductions_and_decompositions_are_the_cpus(c: Tensor, g: Tensor) -> None:
    assert [float(value) for value in torch.aminmax(g)] == [0.0, 11.0]
    assert torch.equal(g.topk(2).values.cpu(), c.topk(2).values)
    assert torch.equal(torch.linalg.svd(g, full_matrices=False)[1].cpu(), torch.linalg.svd(c, full_matrices=False)[1])
    assert torch.linalg.qr(g)[0].is_cuda
    assert torch.equal(torch.fft.fft(g).cpu(), torch.fft.fft(c))
    assert torch.fft.ifft2(g.to(torch.complex64)).real.is_cuda
    assert torch.equal(torch.histc(g.long(), 4, 0, 11).cpu(), torch.histc(c, 4, 0, 11).long())


@check
def sparse_tensors_add_up(c: Tensor, g: Tensor) -> None:
    places = torch.tensor([[0, 2], [1, 3]])
    of_the_card = torch.sparse_coo_tensor(places.cuda(), torch.ones(2).cuda(), (3, 4))
    of_the_cpu = torch.sparse_coo_tensor(places, torch.ones(2), (3, 4))
    assert of_the_card.is_cuda
    assert torch.equal((g + of_the_card).cpu(), c + of_the_cpu)
    assert torch.equal(of_the_card.to_dense().cpu(), of_the_cpu.to_dense())


@check
def outputs_grow(c: Tensor, g: Tensor) -> None:
    out = torch.empty(0, device="cuda")
    torch.mul(g, 2, out=out)
    assert torch.equal(out.cpu(), c * 2)


@check
def a_parameter_gets_the_data_of_a_card(c: Tensor, g: Tensor) -> None:
    parameter = torch.nn.Parameter(c.clone())
    parameter.data = g
    assert (parameter.is_cuda, type(parameter)) == (True, torch.nn.Parameter)
    assert type(g) is Tensor


@check
def storages_are_of_the_card(c: Tensor, g: Tensor) -> None:
    assert g.data_ptr()
    assert g.untyped_storage().device.type == "cuda"
    assert not g.is_pinned()


@check
def gradients_flow(c: Tensor, g: Tensor) -> None:
    leaf = g.clone().requires_grad_()
    (leaf * 2).sum().backward()
    assert torch.equal(leaf.grad.cpu(), torch.full((3, 4), 2.0))


@check
def modules_move_and_are_copied(c: Tensor, g: Tensor) -> None:
    layer = torch.nn.Linear(4, 2)
    moved = copy.deepcopy(layer).to("cuda")
    again = copy.deepcopy(moved)
    assert torch.equal(moved(g).cpu(), layer(c))
    assert again.weight.is_cuda
    assert torch.equal(again.weight.cpu(), layer.weight)


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


def _merge_check(dtype: torch.dtype, *, dora: bool) -> Callable[[Tensor, Tensor], None]:
    def compare(_: Tensor, __: Tensor) -> None:
        import transformers  # noqa: PLC0415 - takes seconds
        from peft import LoraConfig, get_peft_model  # noqa: PLC0415

        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=64)).to(dtype)
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, use_dora=dora)
        model = get_peft_model(base, config)
        moved = copy.deepcopy(model).to("cuda")
        ids = torch.arange(6)[None]
        with torch.no_grad():
            expected, logits = model(ids).logits, moved(ids.to("cuda")).logits
        torch.testing.assert_close(logits.cpu(), expected, rtol=1e-2, atol=1e-2 if dtype.itemsize == 2 else 1e-5)
        assert ONE_DEVICE in str(_error(lambda: moved(ids)))
        expected_state = model.merge_and_unload(safe_merge=True).state_dict()
        state = moved.merge_and_unload(safe_merge=True).state_dict()
        assert all(tensor.is_cuda for tensor in state.values())
        if dora and dtype is not torch.float32:  # PEFT computes a DoRA's norm in another dtype on the CPU
            return
        assert all(torch.equal(state[name].cpu(), expected_state[name]) for name in expected_state)

    return compare


for _dtype in (torch.float32, torch.bfloat16):
    for _dora in (False, True):
        CHECKS[f"PEFT merges {'DoRA' if _dora else 'LoRA'} in {_dtype}"] = _merge_check(_dtype, dora=_dora)


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
