"""Models that run together: the bits of a run alone, and each tensor filled once."""

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import layer as lora_layer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from merge_gate.engine.forward import lockstep
from merge_gate.engine.forward.lockstep import ModelRun, run_together, with_norms_in_blocks
from tests.support.engine.blocks_layers import threads, tuner_layer
from tests.support.engine.forward_trials import in_lockstep, trial

SAMPLE = ("llama", "gpt2", "t5", "mixtral", "gpt_oss", "mamba", "jamba", "whisper", "vilt")
"""Tied weights, fused experts, weights that are read without a call, an encoder, and random numbers."""


@pytest.mark.parametrize("model_type", SAMPLE)
def test_base_and_adapter_give_the_bits_of_runs_alone(model_type: str) -> None:
    with threads(1):  # as the lockstep has
        outcome = trial(model_type)
    assert (outcome.lockstep, outcome.twice, outcome.repeats, outcome.finite) == (None, (), True, True), outcome
    assert outcome.share == pytest.approx(1.0)


class _Layers(nn.Module):
    """Two layers, and a block whose two weights are read in turns, from `first` on."""

    def __init__(self, first: int = 0, stops: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.linear, self.block, self.last = nn.Linear(4, 4), nn.Module(), nn.Linear(4, 4)
        self.block.left, self.block.right = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4, 4))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.first, self.stops = first, stops

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        try:
            hidden: torch.Tensor = self.linear(inputs)
            for turn in range(4):
                hidden = hidden @ (self.block.left, self.block.right)[(self.first + turn) % 2]
            last: torch.Tensor = self.last(hidden)
        except BaseException:
            if self.stops:
                raise
            last = self.last(inputs)  # as code with a bare `except` goes on
        return last


INPUTS = {"inputs": torch.linspace(-1, 1, 4)[None]}


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


@contextlib.contextmanager
def _as_they_are(_: Iterable[str]) -> Iterator[None]:
    yield


def test_weights_that_models_read_in_turns_are_filled_once() -> None:
    base = _Layers()
    models: list[Any] = [base, _Layers(first=1), _Layers()]
    for model in models[1:]:
        for path in ("linear", "block", "last"):
            setattr(model, path, getattr(base, path))
    alone = [model(**INPUTS).detach() for model in models]
    runs, fills = in_lockstep(models, INPUTS, base)
    assert all(torch.equal(run.returned, one) for run, one in zip(runs, alone, strict=True))
    assert fills == dict.fromkeys(_tensors(base), 1)


def test_a_model_has_values_of_its_own_in_place_of_a_tensors() -> None:
    base = _Layers()
    made: list[str] = []

    def own(name: str) -> torch.Tensor | None:
        made.append(name)
        return base.block.left.detach().T * 2 if name == "block.left" else None  # with other strides

    runs = [ModelRun(model=base, inputs=INPUTS), ModelRun(model=base, inputs=INPUTS, own=own)]
    run_together(runs, _tensors(base), _as_they_are)
    plain = base(**INPUTS)
    base.block.left.data = base.block.left.data.T.contiguous() * 2
    assert torch.equal(runs[0].returned, plain)
    assert torch.equal(runs[1].returned, base(**INPUTS))
    assert sorted(made) == sorted(_tensors(base))  # once for each, although the block's are read twice


def test_a_model_that_fails_leaves_the_others_alone() -> None:
    base = _Layers()
    runs = [ModelRun(model=base, inputs={"inputs": torch.zeros(1, 3)}), ModelRun(model=base, inputs=INPUTS)]
    run_together(runs, _tensors(base), _as_they_are)
    assert isinstance(runs[0].error, RuntimeError)
    assert (runs[0].returned, runs[0].error.__traceback__, runs[1].error) == (None, None, None)
    assert torch.equal(runs[1].returned, base(**INPUTS))


@pytest.mark.parametrize("stops", [True, False])
def test_a_failure_to_fill_is_raised_and_ends_all_threads(stops: bool) -> None:
    base = _Layers(stops=stops)

    @contextlib.contextmanager
    def filled(names: Iterable[str]) -> Iterator[None]:
        if "block.left" in set(names):
            raise OSError("the disk is gone")
        yield

    before = threading.active_count()
    with pytest.raises(OSError, match="the disk is gone"):
        run_together([ModelRun(model=base, inputs=INPUTS) for _ in range(3)], _tensors(base), filled)
    assert threading.active_count() == before


def test_code_that_loops_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(_Layers):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            while True:
                inputs = inputs + 1

    monkeypatch.setattr(lockstep, "MOST_OPERATIONS", 100)
    runs = [ModelRun(model=Endless(), inputs=INPUTS), ModelRun(model=_Layers(), inputs=INPUTS)]
    run_together(runs, {}, _as_they_are)
    assert (type(runs[0].error), runs[1].error) == (RuntimeError, None)


def test_random_numbers_are_those_of_seed_0() -> None:
    class Noisy(_Layers):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return super().forward(inputs + torch.rand(1, 4)) + torch.rand(1, 4)

    base = Noisy()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        alone = base(**INPUTS)
    state = torch.get_rng_state()
    runs = [ModelRun(model=base, inputs=INPUTS), ModelRun(model=base, inputs=INPUTS)]
    run_together(runs, _tensors(base), _as_they_are)
    assert all(torch.equal(run.returned, alone) for run in runs)
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [300, 2 * lockstep.PRODUCT_ELEMENTS // 100])
def test_products_in_float16_are_summed_in_float32(bias: bool, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # With oneDNN, processors with AVX512-FP16 sum in float32 themselves.
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    torch.manual_seed(0)
    layer, inputs = nn.Linear(100, outputs, bias=bias).half(), torch.randn(16, 100).half()
    wide = [one.float() for one in (inputs, *layer.parameters())]
    expected = nn.functional.linear(*wide).half()
    run = ModelRun(model=layer, inputs={"input": inputs})
    run_together([run], _tensors(layer), lambda _: contextlib.nullcontext())
    assert run.error is None
    assert run.returned.dtype is torch.float16
    of_run, of_torch = ((found == expected).float().mean() for found in (run.returned, layer(inputs)))
    assert of_run > 0.99
    assert of_torch > 0.99 or of_torch < of_run, "some processors add in float32 themselves"


def test_a_product_that_torch_refuses_in_float16_is_refused() -> None:
    layer = nn.Linear(4, 3, bias=False).half()
    run = ModelRun(model=layer, inputs={"input": torch.ones(2, 4)})
    run_together([run], _tensors(layer), lambda _: contextlib.nullcontext())
    assert "same dtype" in str(run.error)


def test_an_empty_product_in_float16_is_zero() -> None:
    layer = nn.Linear(1, 3, bias=False).half()
    layer.weight = nn.Parameter(torch.empty(3, 0).half())
    run = ModelRun(model=layer, inputs={"input": torch.ones(2, 0).half()})
    run_together([run], _tensors(layer), lambda _: contextlib.nullcontext())
    assert run.error is None
    assert run.returned.tolist() == [[0.0] * 3] * 2


# --- DoRA's norms from a few rows at a time: PEFT's results, at the price of LoRA ----------------------------------

INPUTS_OF = 800
OF_KINDS = {
    "linear": torch.linspace(-1, 1, 3 * INPUTS_OF).view(1, 3, INPUTS_OF),
    "conv1d": torch.linspace(-1, 1, 3 * INPUTS_OF).view(1, 3, INPUTS_OF),
    "embedding": torch.tensor([[0, 7, 39]]),
    "conv2d": torch.linspace(-1, 1, INPUTS_OF * 9).view(1, INPUTS_OF, 3, 3),
}


def layer_of(kind: str, dtype: torch.dtype) -> Any:
    """PEFT's layer of DoRA, whose weight has more values than a block."""
    if kind != "conv2d":
        return tuner_layer(kind, 700, INPUTS_OF, 4, dora=True, dtype=dtype).eval()
    torch.manual_seed(0)
    config = LoraConfig(r=4, use_dora=True)
    layer: Any = lora_layer.Conv2d(torch.nn.Conv2d(INPUTS_OF, 100, 3).to(dtype), "default", config, r=4, lora_alpha=8)
    for parameter in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
        parameter.data = torch.randn(parameter.shape).mul(0.1)
    magnitude = layer.lora_magnitude_vector["default"].weight
    magnitude.data = torch.rand(magnitude.shape).add(0.5)
    return layer.eval()


class Sizes(TorchDispatchMode):
    """Collects the most elements that one operation returns, views aside."""

    most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        is_view = any(one.alias_info is not None for one in function._schema.returns)
        if isinstance(result, torch.Tensor) and not is_view:
            self.most = max(self.most, result.numel())
        return result


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", OF_KINDS)
def test_a_layer_returns_pefts_values_without_a_large_product(kind: str, dtype: torch.dtype) -> None:
    layer, inputs = layer_of(kind, dtype), OF_KINDS[kind]
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    of_peft = layer(inputs)
    with_norms_in_blocks(layer)
    with Sizes() as sizes:
        found = layer(inputs)
    assert found.dtype == of_peft.dtype
    torch.testing.assert_close(found, of_peft, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    assert sizes.most < layer.get_base_layer().weight.numel()


@torch.no_grad()
def test_a_row_that_the_adapter_nearly_erases_has_its_own_norm() -> None:
    """The norm of the sum is a millionth of both terms'."""
    layer = layer_of("linear", torch.float32)
    weight, a, b = layer.get_base_layer().weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight[5] = -2.0 * (b[5] @ a)
    weight[5, 3] += 1e-6 * weight[5].norm()
    exact = (weight.double() + 2.0 * (b.double() @ a.double())).norm(dim=1)
    layer.lora_magnitude_vector["default"].weight.data = exact.float()
    with_norms_in_blocks(layer)
    returned, merged = layer(OF_KINDS["linear"]), weight + 2.0 * (b @ a)
    torch.testing.assert_close(returned[..., 5], OF_KINDS["linear"] @ merged[5], rtol=0.2, atol=1e-7)
