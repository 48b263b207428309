"""Which device merges a layer, how it computes, and which errors belong to the run. No test here needs a card."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer

from merge_gate._internal.errors import CardError
from merge_gate.engine import probes
from merge_gate.engine.tensors.placement import (
    WeightsOnDevice,
    device_of,
    raise_if_of_the_run,
    random_states,
    restore_random,
)
from merge_gate.files.preflight import preflight
from merge_gate.worker.protocol import Merged
from tests.support import faults_methods, methods
from tests.support.engine.jobs import events_of, group_of
from tests.support.engine.merges import NOT_RUN, merge_adapter
from tests.support.gating import Bench

CARD = torch.device("cuda:0")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("lora-linear", CARD),
        ("lora-mha", CARD),
        ("adalora-linear", CARD),
        ("oft-linear", CPU),
        ("supertuning-linear", CPU),
        ("shira-linear", CPU),
        ("waveft-linear", CPU),
        ("trainable-tokens", CPU),
    ],
)
def test_an_adapter_that_has_indices_is_merged_on_the_cpu(name: str, device: torch.device, bench: Bench) -> None:
    case = methods.find(name)
    model = methods.load_adapter(bench.base(case.base, "float32"), bench.adapter(case))
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert {device_of(layer, CARD) for layer in layers} == {device}
    assert {device_of(layer, CPU) for layer in layers} == {CPU}


def test_a_run_on_a_cpu_keeps_no_copies() -> None:
    weights, weight = WeightsOnDevice(), torch.ones(2)
    assert weights.take("weight", weight, CPU).data_ptr() == weight.data_ptr()
    assert not weights.drop()


def test_the_worker_computes_in_full_precision(bench: Bench) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    cudnn.allow_tf32 = matmul.allow_tf32 = True
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = True
    case = methods.find("lora-linear")
    (*_, last) = events_of(group_of(bench.base_directory(case.base, "float32"), bench.adapter(case)))
    assert isinstance(last, Merged)
    assert not cudnn.allow_tf32
    assert not matmul.allow_tf32
    assert not matmul.allow_fp16_reduced_precision_reduction
    assert not matmul.allow_bf16_reduced_precision_reduction
    assert torch.get_float32_matmul_precision() == "highest"
    if hasattr(torch.backends, "fp32_precision"):
        places = (torch.backends, cudnn.conv, cudnn.rnn, matmul, torch.backends.mkldnn.matmul)
        assert {place.fp32_precision for place in places} == {"ieee"}


def test_random_numbers_are_restored() -> None:
    states = random_states()
    drawn = torch.rand(3)
    assert not all(map(torch.equal, states, random_states()))
    restore_random(states)
    assert torch.equal(torch.rand(3), drawn)


OF_A_CARD = (
    "CUDA error: device-side assert triggered\nCUDA kernel errors might be reported later",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA driver error: invalid argument",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`",
    "HIP error: the operation cannot be performed in the present state",
)


@pytest.mark.parametrize("text", OF_A_CARD)
def test_an_error_of_a_card_is_no_adapters(text: str) -> None:
    with pytest.raises(CardError) as raised:
        raise_if_of_the_run(RuntimeError(text))
    assert str(raised.value) == f"the GPU failed: {text.splitlines()[0]}"


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_a_lack_of_memory_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)):
        raise_if_of_the_run(error)


QUOTED = "Unknown initialization init_lora_weights='CUDA error'"


@pytest.mark.parametrize(
    "error",
    [
        *map(RuntimeError, ("LoftQ needs CUDA or XPU", "index 7 is out of bounds", "mat1 and mat2")),
        RuntimeError("Error(s): missing key 'CUDA error: x'"),
        ValueError(QUOTED),
        NotImplementedError(QUOTED),
    ],
)
def test_another_error_is_the_adapters(error: Exception) -> None:
    raise_if_of_the_run(error)


def failing(kind: type[Exception], text: str) -> Callable[..., None]:
    def merge(*_: Any, **__: Any) -> None:
        raise kind(text)

    return merge


@pytest.mark.parametrize(("name", "layer"), [("lora-linear", Linear), ("adalora-linear", SVDLinear)])
def test_a_merge_that_a_card_ends_blames_no_adapter(name, layer, bench, monkeypatch) -> None:
    """Whether it is a cross-check, or the merge that counts."""
    case = methods.find(name)
    files = preflight(str(bench.adapter(case)), allow_pickle=False)
    base = bench.gate.base(bench.base_directory(case.base, "float32"), files, dtype="auto")
    monkeypatch.setattr(layer, "merge", failing(RuntimeError, "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"))
    with pytest.raises(CardError):
        merge_adapter(base, files, no_forward=NOT_RUN)


def test_a_card_full_in_a_probe_says_nothing_of_the_tensor(bench, monkeypatch, tmp_path) -> None:
    case = methods.find("lora-linear")
    state = copy.deepcopy(dict(faults_methods.load_file(bench.adapter(case) / methods.WEIGHTS)))
    next(iter(state.values())).view(-1)[0] = torch.nan
    files = preflight(str(methods.write_variant(bench.adapter(case), tmp_path / "nan", state)), allow_pickle=False)
    base = bench.gate.base(bench.base_directory(case.base, "float32"), files, dtype="auto")
    monkeypatch.setattr(probes, "merged_once", failing(torch.OutOfMemoryError, "CUDA out of memory."))
    with pytest.raises(torch.OutOfMemoryError):
        merge_adapter(base, files, no_forward=NOT_RUN)


def test_a_full_card_has_a_second_chance_without_kept_weights(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    case = methods.find("lora-linear")
    files = preflight(str(bench.adapter(case)), allow_pickle=False)
    base = bench.gate.base(bench.base_directory(case.base, "float32"), files, dtype="auto")
    own = Linear.merge

    def merge(layer: Any, *given: Any, **named: Any) -> None:
        if base.weights.keeps:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        own(layer, *given, **named)

    monkeypatch.setattr(Linear, "merge", merge)
    with pytest.raises(torch.OutOfMemoryError):  # it keeps nothing
        merge_adapter(base, files, no_forward=NOT_RUN)
    base.weights = WeightsOnDevice()
    monkeypatch.setitem(base.weights._kept, "weight", torch.ones(2))
    assert merge_adapter(base, files, no_forward=NOT_RUN).refusal is None
    assert not base.weights.drop()
