"""PEFT's own merges, made wrong in fifteen ways: each is found, and the layer is named.

PEFT's code merges, and then the change that it made to the weight is changed. Layers that go in blocks are merged by
the gate, and PEFT merges one of each kind, so a fault of PEFT on another layer cannot reach the result.
"""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from merge_gate.engine.merge import proof
from merge_gate.records.terms import Quantization, Verdict
from tests.support import methods
from tests.support.engine.merges import NOT_RUN
from tests.support.engine.wrong_merges import ALL, METHODS, PAIRS, TARGETS, WAYS, Fault, Merge, Way, case_of, key_of
from tests.support.gating import Bench, Gate, Judgement
from tests.support.sampled import sampled


@pytest.fixture(scope="module")
def bench(bench: Bench) -> Bench:
    return dataclasses.replace(bench, gate=Gate(no_forward=NOT_RUN))


def judged(bench: Bench, case: methods.Case, dtype: str) -> Judgement:
    return bench.gate.judge(bench.adapter(case), bench.base_directory(case.base, dtype))


def found(bench: Bench, base: str, method: str, way: str, dtype: str) -> bool:
    """Whether the fault was made, and then it was found in a layer that has it."""
    case, fault = case_of(base, method), Fault(WAYS[way])
    with fault.made():
        judgement = judged(bench, case, dtype)
    if not fault.broken:
        return False
    check = "merged-nonfinite" if way == "one NaN" else "merge-differs"
    assert judgement.verdict is Verdict.FAILED, (way, dtype, judgement)
    assert judgement.cause == check, (way, dtype, judgement)
    state = bench.base(base, dtype).state_dict()
    names = {name.rpartition(".")[0] for name, values in state.items() if key_of(values) in fault.broken}
    named = {one.module for one in judgement.evidence.different} if check == "merge-differs" else set()
    named |= {one.module for one in judgement.findings if one.check == check}
    assert named, judgement
    assert named <= names, (way, dtype, names, judgement)
    return True


@pytest.mark.parametrize("pair", sampled(PAIRS, PAIRS[::7]))
def test_each_way_of_a_wrong_merge_is_found(pair: tuple[str, str], bench: Bench) -> None:
    """Each way in one of three dtypes, with another one for the next method."""
    base, method = pair
    dtypes = itertools.islice(itertools.cycle(methods.DTYPES), list(METHODS).index(method), None)
    made = [way for way, dtype in zip(WAYS, dtypes, strict=False) if found(bench, base, method, way, dtype)]
    impossible = IMPOSSIBLE | ({"transposed"} if base == "resnet" else set())
    assert set(WAYS) - set(made) <= impossible - POSSIBLE.get(method, set())


IMPOSSIBLE = {"DoRA as LoRA", "smallest rank dropped", "one layer transposed"}
"""The first of GPT-2's layers is not square, and a kernel is no matrix."""
POSSIBLE = {"dora": {"DoRA as LoRA"}, "lora": {"smallest rank dropped"}}


@pytest.mark.parametrize("dtype", methods.DTYPES)
def test_without_a_fault_nothing_differs(dtype: str, bench: Bench) -> None:
    for base in TARGETS:
        judgement = judged(bench, case_of(base, "lora"), dtype)
        assert judgement.verdict is Verdict.PASSED, judgement
        assert judgement.evidence.different == ()
        assert judgement.evidence.forward.layers_compared > 0
        assert judgement.evidence.forward.largest_difference < 1e-4


SAVED = {
    "llama": "lm_head", "t5": "lm_head", "bert": "pooler.dense", "xlm-roberta": "LayerNorm", "qwen2-moe": "lm_head",
    "siglip": "post_layernorm", "wav2vec2": "encoder.layer_norm", "resnet": "normalization", "mixtral": "embed_tokens",
    "gpt2": "ln_f", "bert-classifier": "classifier",
}  # fmt: skip
"""A module of each base that can be trained whole: heads, embeddings, and normalizations."""


def saved_case(base: str) -> methods.Case:
    settings = {"r": 4, "target_modules": TARGETS.get(base, ["query"])}
    return methods.make_case(f"{base}-saved", base, "LoraConfig", modules_to_save=[SAVED[base]], **settings)


def saved_wrongly(way: Way, *, in_place: bool) -> Callable[..., nn.Module]:
    """What a broken PEFT returns for a module that is trained whole."""
    numbers = itertools.count()

    def unload(wrapper: Any, **_: Any) -> nn.Module:
        trained = wrapper.modules_to_save["default"]
        returned, number = trained if in_place else copy.deepcopy(trained), next(numbers)
        for name, after in returned.named_parameters():
            before = wrapper.original_module.get_parameter(name).data
            wrong = way(Merge(trained, before, after.data, number, after.data - before))
            if wrong is not None and not torch.equal(wrong, after.data):  # any write is found
                after.data.copy_(wrong)
        return returned

    return unload


def saved_cases() -> Iterator[Any]:
    """One base in every dtype, each of the others in one, and in two more for `make nightly`."""
    yield from (pytest.param("bert-classifier", dtype) for dtype in methods.DTYPES)
    for number, base in enumerate(TARGETS):
        for place, dtype in enumerate(methods.DTYPES):
            yield pytest.param(base, dtype, marks=pytest.mark.slow if place == number % 3 else pytest.mark.nightly)


@pytest.mark.parametrize(("base", "dtype"), [*saved_cases()])
def test_each_way_of_a_wrong_trained_module_is_found(base: str, dtype: str, bench: Bench) -> None:
    """It has no factors. Only some modules are square."""
    assert judged(bench, saved_case(base), dtype).verdict is Verdict.PASSED
    missed = set()
    for number, (name, way) in enumerate(WAYS.items()):
        with pytest.MonkeyPatch.context() as patched:
            unload = saved_wrongly(way, in_place=number % 2 == 0)
            patched.setattr(ModulesToSaveWrapper, "unload_and_optionally_merge_module", unload)
            judgement = judged(bench, saved_case(base), dtype)
        if judgement.verdict is Verdict.PASSED:
            missed.add(name)
            continue
        check = "merge-differs"
        modules = {one.module for one in judgement.findings if one.check == check}
        assert judgement.cause == check, (name, judgement)
        assert modules, (name, judgement)
        assert all(f".{one}".endswith(f".{SAVED[base]}") for one in modules), (name, judgement)
    of_factors, of_squares = {"smallest rank dropped", "DoRA as LoRA"}, {"transposed", "one layer transposed"}
    assert missed == of_factors | (set() if base == "bert" else of_squares)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_two_names_for_a_trained_parameter_do_not_differ(dtype: str, bench: Bench) -> None:
    """The file has other values under each name, and PEFT loads one of them."""
    settings = {"r": 4, "target_modules": ["query"], "modules_to_save": ["lm_head"]}
    judgement = judged(bench, methods.make_case("two-names", "xlm-roberta", "LoraConfig", **settings), dtype)
    assert judgement.verdict is Verdict.PASSED, judgement


def test_attention_of_torch_is_compared(bench: Bench) -> None:
    for name in ("lora-mha", "lora-mha-bias-term"):
        evidence = judged(bench, methods.find(name), "float16").evidence
        assert (evidence.forward.layers_compared, evidence.different) == (1, ())


def test_a_convolution_of_any_reach_takes_no_memory() -> None:
    """A configuration can name a dilation that no memory holds an input for."""
    far = nn.Conv2d(2, 2, 3, dilation=1 << 20, device="meta")
    model = lora.layer.Conv2d(far, "default", config=LoraConfig(r=2), r=2)
    assert proof._inputs(model, torch.Generator()) == ()
    near = lora.layer.Conv2d(nn.Conv2d(2, 2, 3, dilation=2), "default", config=LoraConfig(r=2), r=2)
    assert [one.shape for one in proof._inputs(near, torch.Generator())] == [(2, 2, 16, 16)]


class _Doubled(nn.Module):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name
        return 2 * super().forward(input)


class _DoubledConvolution(_Doubled, nn.Conv2d): ...


class _DoubledLinear(_Doubled, nn.Linear): ...


def difference_of(layer: nn.Module) -> float:
    """How much the merge of a LoRA on this layer differs."""
    config = LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
    model: Any = get_peft_model(nn.Sequential(layer), config)
    adapted = model.base_model.model[0]
    with torch.no_grad():
        before = proof.unmerged(adapted, torch.device("cpu"))
        adapted.merge()
        found = before.compared("0", "Doubled", adapted) if before is not None else None
    return proof.difference(found) if found is not None else math.nan


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 2, 0), (1, 3, 1), (2, 4, 0), (3, 1, 1), (3, 7, 2)])
def test_no_stride_steps_over_the_values_of_a_convolution(kernel: int, stride: int, padding: int) -> None:
    assert difference_of(_DoubledConvolution(3, 8, kernel, stride=stride, padding=padding)) > proof.MOST_ERROR_SHARE
    assert difference_of(nn.Conv2d(3, 8, kernel, stride=stride, padding=padding)) < proof.MOST_ERROR_SHARE


def test_one_value_that_is_not_finite_hides_nothing() -> None:
    layer = _DoubledLinear(8, 4)
    with torch.no_grad():
        layer.bias[1] = torch.inf
    assert difference_of(layer) > proof.MOST_ERROR_SHARE


def test_a_fault_in_a_layer_in_blocks_does_not_reach_the_result(bench: Bench) -> None:
    """The blocks are the gate's own. PEFT merges one layer of a kind, and its fault would be in another one."""
    base = bench.base("llama", "float32").state_dict()
    case = methods.make_case("all", "llama", "LoraConfig", r=4, target_modules=ALL)
    healthy = judged(bench, case, "float32").evidence
    (unchecked,) = {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"} - {*healthy.cross_checked}
    key = key_of(base[f"{unchecked}.weight"])
    fault = Fault(lambda merge: merge.before if key_of(merge.before) == key else merge.after)
    with fault.made():
        judgement = judged(bench, case, "float32")
    assert judgement.verdict is Verdict.PASSED, judgement
    assert judgement.evidence.merges == healthy.merges


class ScaledLinear(nn.Linear):
    """A layer whose forward depends on a setting of its own."""

    def forward(self, values: Tensor) -> Tensor:
        return super().forward(values * self.factor) if self.factor == 1 else super().forward(values) + self.weight[0]


def test_layers_with_other_settings_are_compared_apart(bench: Bench) -> None:
    """Both have the same class and shapes; one adds what its weight holds, which PEFT's forward does not know."""
    case = methods.make_case("two", "llama", "LoraConfig", r=4, target_modules=["q_proj", "o_proj"])
    assert judged(bench, case, "float32").verdict is Verdict.PASSED
    (base,) = (base for key, base in bench.gate.loaded.items() if key[0].endswith("llama/float32"))
    attention = base.model.model.layers[0].self_attn
    changed = {attention.q_proj: 1, attention.o_proj: 2}
    try:
        for layer, factor in changed.items():
            layer.__class__, layer.factor = ScaledLinear, factor
        base.template = None
        judgement = judged(bench, case, "float32")
    finally:
        for layer in changed:
            layer.__class__ = nn.Linear
            del layer.factor
        base.template = None
    assert judgement.cause == "merge-differs", judgement
    assert [one.module for one in judgement.evidence.different] == ["model.layers.0.self_attn.o_proj"]


@pytest.mark.parametrize("quantization", [Quantization.BNB_8BIT, Quantization.BNB_4BIT])
def test_a_quantized_layer_is_compared_before_it_is_packed(quantization, bench, monkeypatch) -> None:
    adapter, base = bench.adapter(methods.find("lora-linear")), bench.base_directory("llama", "bfloat16")
    judgement = bench.gate.judge(adapter, base, quantization=quantization)
    assert judgement.verdict is Verdict.PASSED, judgement
    assert judgement.evidence.forward.layers_compared > 0
    assert judgement.evidence.forward.largest_difference < 1e-4
    kind = lora.Linear8bitLt if quantization is Quantization.BNB_8BIT else lora.Linear4bit
    real = kind.get_delta_weight
    monkeypatch.setattr(kind, "get_delta_weight", lambda self, adapter: 1.1 * real(self, adapter))
    judgement = bench.gate.judge(adapter, base, quantization=quantization)
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "merge-differs"), judgement
    assert len(judgement.evidence.different) == 2
