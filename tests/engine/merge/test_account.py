"""Every tensor of the final model is accounted for: faults before, in, and after PEFT's merges of its layers.

| stage | what is wrong | test |
|---|---|---|
| in, only the merge that ships | the fifteen ways of wrong_merges.py | `test_each_fault_…` |
| before and after | the fifteen ways, made of the base's weights | `test_each_way_…` |
| before and after | layers exchanged, an embedding or a norm changed, a trained copy or a layer left out | `OTHERS` |

In 16 bits, and with either value of `safe_merge`. A fault that changes what PEFT's forward computes in the same way is
not found: the scaling, or the factors, before the merge.
"""

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from peft import get_peft_model
from peft.tuners import lora, road
from peft.tuners.lora.layer import Embedding, Linear
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor, nn

from merge_gate.engine.merge.rounded_merge import unexplained
from merge_gate.records.terms import Quantization, Verdict
from tests.support import methods
from tests.support.engine.merges import NOT_RUN
from tests.support.engine.wrong_merges import PAIRS, TARGETS, WAYS, Fault, Merge, case_of, key_of, one_value
from tests.support.gating import Bench, Gate, Judgement


@pytest.fixture(scope="module")
def bench(bench: Bench) -> Bench:
    return dataclasses.replace(bench, gate=Gate(no_forward=NOT_RUN))


def judged(bench: Bench, case: methods.Case, dtype: str, *, safe_merge: bool = True) -> Judgement:
    bench.gate.safe_merge = safe_merge
    return bench.gate.judge(bench.adapter(case), bench.base_directory(case.base, dtype))


def assert_differs(judgement: Judgement, tensors: set[str], where: object) -> None:
    """The cause is merge-differs, and what it names is in `tensors` (or a module of one of these)."""
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "merge-differs"), (where, judgement)
    first = next(one for one in judgement.findings if one.check == "merge-differs")
    modules = {name.rpartition(".")[0] for name in tensors}
    assert first.tensor in tensors if first.tensor else first.module in modules | tensors, (where, judgement)


# --- in ------------------------------------------------------------------------------------------------------------


def found(bench: Bench, base: str, method: str, way: str, dtype: str, *, safe_merge: bool) -> bool:
    """Whether the fault was made in the merge that ships, and in no other; then it was found."""
    final = methods.DTYPES[dtype]
    fault = Fault(WAYS[way], lambda made, safe: (made, safe) == (final, safe_merge))
    with fault.made():
        judgement = judged(bench, case_of(base, method), dtype, safe_merge=safe_merge)
    if not fault.broken:
        return False
    if way == "one NaN":
        assert judgement.cause == "merged-nonfinite", (way, dtype, judgement)
        return True
    state = bench.base(base, dtype).state_dict()
    broken = {name for name, values in state.items() if key_of(values) in fault.broken}
    assert_differs(judgement, broken, (base, method, way, dtype, safe_merge))
    return True


def ships(method: str, *, safe_merge: bool) -> bool:
    """Without safe_merge, LoRA in blocks has no merge by PEFT that ships."""
    return safe_merge or method not in ("lora", "dora")


@pytest.mark.parametrize(
    ("base", "method"), [pytest.param(*pair, marks=() if pair[0] == "llama" else pytest.mark.slow) for pair in PAIRS]
)
def test_each_fault_of_the_merge_that_ships_is_found(base: str, method: str, bench: Bench) -> None:
    """Each way in one of three dtypes, with another one for the next base."""
    made = []
    for number, way in enumerate(WAYS, list(TARGETS).index(base)):
        dtype, safe = list(methods.DTYPES)[number % 3], number % 2 == 0 or not ships(method, safe_merge=False)
        made += [way] if found(bench, base, method, way, dtype, safe_merge=safe) else []
    assert len(made) > 10 or base != "llama", made


@pytest.mark.nightly
@pytest.mark.parametrize(("base", "method"), PAIRS)
def test_each_fault_is_found_in_every_dtype(base: str, method: str, bench: Bench) -> None:
    for way, dtype, safe in itertools.product(WAYS, methods.DTYPES, (True, False)):
        if ships(method, safe_merge=safe):
            found(bench, base, method, way, dtype, safe_merge=safe)


# --- before and after ----------------------------------------------------------------------------------------------

Change = Callable[[nn.Module], set[str]]
"""Changes a model, and returns the names of the tensors that are wrong then."""


@contextlib.contextmanager
def changed(change: Change, stage: str) -> Iterator[set[str]]:
    """PEFT changes the model before or after it merges its layers. Yields the names of what it has changed."""
    names: set[str] = set()
    merge_all = BaseTuner._unload_and_optionally_merge

    def with_change(tuner: Any, *given: Any, **named: Any) -> Any:
        if stage == "before":
            names.update(change(tuner.model))
        merge_all(tuner, *given, **named)
        if stage == "after":
            names.update(change(tuner.model))
        return tuner.model

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(BaseTuner, "_unload_and_optionally_merge", with_change)
        yield names


def place_of(path: str) -> str:
    return path.replace("base_layer.", "").replace("original_module.", "")


def replaced(end: str, change: Callable[[Tensor], Tensor], *, in_place: bool) -> Change:
    """Give other values to the parameter that ends so."""

    def apply(model: nn.Module) -> set[str]:
        path, parameter = next((path, one) for path, one in model.named_parameters() if place_of(path).endswith(end))
        wrong = change(parameter.data)
        if in_place:
            parameter.data.copy_(wrong)
        else:
            parameter.data = wrong
        return {place_of(path)}

    return apply


def exchanged(model: nn.Module) -> set[str]:
    """The memory of two layers."""
    ends = ("q_proj.weight", "k_proj.weight")
    (one, first), (other, second) = (
        next((path, one) for path, one in model.named_parameters() if place_of(path).endswith(end)) for end in ends
    )
    first.data, second.data = second.data, first.data
    return {place_of(one), place_of(other)}


def one_layer_left_out(model: nn.Module) -> set[str]:
    """PEFT never merges it."""
    *_, (path, layer) = ((path, one) for path, one in model.named_modules() if isinstance(one, BaseTunerLayer))
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer.get_base_layer())
    return {path}


def trained_module_left_out(model: nn.Module) -> set[str]:
    path, wrapper = next((path, one) for path, one in model.named_modules() if isinstance(one, ModulesToSaveWrapper))
    wrapper.modules_to_save["default"] = wrapper.original_module
    return {f"{path}.weight"}


BOTH = ("before", "after")
OTHERS: dict[str, tuple[tuple[str, ...], Change]] = {
    "layers exchanged": (BOTH, exchanged),
    "embedding reversed": (BOTH, replaced("embed_tokens.weight", lambda w: w.flip(0), in_place=False)),
    "embedding reversed in place": (BOTH, replaced("embed_tokens.weight", lambda w: w.flip(0), in_place=True)),
    "norm times 1.1": (BOTH, replaced("input_layernorm.weight", lambda w: w * 1.1, in_place=False)),
    "norm times 1.1 in place": (BOTH, replaced("input_layernorm.weight", lambda w: w * 1.1, in_place=True)),
    "trained copy times 1.1": (("after",), replaced("lm_head.weight", lambda w: w * 1.1, in_place=False)),
    "trained copy times 1.1 in place": (("after",), replaced("lm_head.weight", lambda w: w * 1.1, in_place=True)),
    "transposed": (("after",), replaced("q_proj.weight", lambda w: w.T, in_place=False)),
    "layer left out": (("before",), one_layer_left_out),
    "trained module left out": (("before",), trained_module_left_out),
}

SAVED: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "k_proj"], "modules_to_save": ["lm_head"]}
BY_METHOD = {
    "lora": methods.make_case("saved-lora", "llama", "LoraConfig", **SAVED),
    "loha": methods.make_case("saved-loha", "llama", "LoHaConfig", **SAVED),
}


@pytest.mark.parametrize("method", BY_METHOD)
@pytest.mark.parametrize("way", OTHERS)
def test_what_peft_does_around_its_layers_is_found(way: str, method: str, bench: Bench) -> None:
    stages, change = OTHERS[way]
    for stage, dtype in itertools.product(stages, methods.DTYPES):
        before = bench.base("llama", dtype).state_dict()
        with changed(change, stage) as names:
            judgement = judged(bench, BY_METHOD[method], dtype)
        assert_differs(judgement, names or set(before), (way, stage, dtype))
        assert judged(bench, BY_METHOD[method], dtype).verdict is Verdict.PASSED, "another adapter does not notice"


@pytest.mark.parametrize("stage", ["before", "after"])
def test_each_way_around_the_layers_is_found(stage: str, bench: Bench) -> None:
    """The change of a layer is that of another one, as good as any."""
    case = BY_METHOD["lora"]
    for number, (name, way) in enumerate(WAYS.items()):
        dtype = list(methods.DTYPES)[number % 3]

        def wrong(weight: Tensor, way: Any = way) -> Tensor:
            delta = 0.1 * weight.roll(3, 0)
            merge = Merge(nn.Module(), weight.clone(), weight + delta, 0, delta)
            return way(merge)

        if name in OF_FACTORS:
            continue
        with changed(replaced("v_proj.weight", wrong, in_place=False), stage) as names:
            judgement = judged(bench, case, dtype)
        if "not merged" in name:  # these are the base's values
            assert judgement.verdict is Verdict.PASSED, (name, judgement)
        else:
            assert {one.check for one in judgement.findings} >= {"merge-differs"}, (name, judgement)
            assert_differs(judgement, names, (name, stage))


OF_FACTORS = {"smallest rank dropped", "DoRA as LoRA"}


@pytest.mark.parametrize("dtype", methods.DTYPES)
def test_a_write_in_the_merge_of_a_layer_stays_in_its_adapter(dtype: str, bench: Bench) -> None:
    case = methods.find("loha-linear")
    healthy = judged(bench, case, dtype)
    (base,) = (one for key, one in bench.gate.loaded.items() if key[0].endswith(f"llama/{dtype}"))
    norm = base.tensors["model.norm.weight"]
    kept = norm.clone()
    merge = LycorisLayer.merge
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LycorisLayer, "merge", lambda *given, **named: (norm.mul_(1.1), merge(*given, **named)))
        judgement = judged(bench, case, dtype)
    assert_differs(judgement, {"model.norm.weight"}, dtype)
    assert torch.equal(norm, kept)
    assert judged(bench, case, dtype).evidence.merges == healthy.evidence.merges


def test_a_write_whose_error_peft_ignores_is_found(bench: Bench) -> None:
    def apply(model: nn.Module) -> set[str]:
        with contextlib.suppress(Exception):
            cast("Any", model).model.norm.weight.data.mul_(1.1)
        return {"model.norm.weight"}

    with changed(apply, "after") as names:
        judgement = judged(bench, BY_METHOD["lora"], "float32")
    assert_differs(judgement, names, "ignored")


@pytest.mark.parametrize("dtype", methods.DTYPES)
def test_a_write_into_what_a_merge_has_left_is_found(dtype: str, bench: Bench) -> None:
    """The initialization of PiSSA has rewritten the weight, so its merge is not put back."""
    with changed(replaced("q_proj.weight", lambda w: w * 1.1, in_place=True), "after") as names:
        judgement = judged(bench, methods.find("lora-pissa"), dtype)
    assert_differs(judgement, names or {"model.layers.0.self_attn.q_proj.weight"}, dtype)


@pytest.mark.parametrize("dtype", methods.DTYPES)
@pytest.mark.parametrize("name", ["lora-linear", "lora-dora", "lora-embedding"])
def test_a_merge_that_changes_its_layer_is_found(name: str, dtype: str, bench: Bench) -> None:
    """What the layer computes is asked before: afterwards it would agree with the wrong merge."""
    with pytest.MonkeyPatch.context() as patched:
        for kind in (Linear, Embedding):

            def wrong(layer: Any, *given: Any, merge: Any = kind.merge, **named: Any) -> None:
                if layer.get_base_layer().weight.dtype is methods.DTYPES[dtype]:
                    layer.scaling["default"] = -abs(layer.scaling["default"])
                merge(layer, *given, **named)

            patched.setattr(kind, "merge", wrong)
        judgement = judged(bench, methods.find(name), dtype)
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "merge-differs"), judgement


@pytest.mark.parametrize("dtype", methods.DTYPES)
@pytest.mark.parametrize("name", ["lora-all-linear", "lora-dora", "loha-linear", "lora-embedding", "lora-tokens"])
def test_a_merge_that_does_nothing_is_found(name: str, dtype: str, bench: Bench) -> None:
    """PEFT does not even mark the layer as merged. Asked itself, the layer would still add its adapter."""
    kinds = {"loha-linear": LycorisLayer, "lora-embedding": Embedding, "lora-tokens": TrainableTokensLayer}
    kind = kinds.get(name, Linear)
    with pytest.MonkeyPatch.context() as patched:

        def some(layer: Any, *given: Any, merge: Any = kind.merge, **named: Any) -> None:
            if name != "lora-all-linear" or layer.get_base_layer().weight.shape[0] == methods.TEXT["intermediate_size"]:
                return
            merge(layer, *given, **named)

        patched.setattr(kind, "merge", some)
        judgement = judged(bench, methods.find(name), dtype)
    assert judgement.verdict is Verdict.FAILED, judgement
    assert "merge-differs" in {one.check for one in judgement.findings}, judgement


# --- the proof of a part of a tensor -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", methods.DTYPES)
@pytest.mark.parametrize("rows", [slice(12, 24), slice(23, 24)])
def test_each_row_of_an_embedding_is_compared(rows: slice, dtype: str, bench: Bench) -> None:
    case = methods.find("lora-embedding")
    fault = Fault(lambda merge: torch.cat((merge.after[: rows.start], merge.by(-1)[rows])))
    with fault.made(Embedding):
        judgement = judged(bench, case, dtype)
    assert_differs(judgement, {"model.embed_tokens.weight"}, (rows, dtype))


def test_peft_counts_where_its_bits_are_not_those_of_the_blocks(bench: Bench) -> None:
    """A release of PEFT, or of torch, that rounds in another order is right, and a note says so."""
    case, merge = methods.find("lora-linear"), Linear.merge

    def once(layer: Any, safe_merge: bool = False, adapter_names: Any = None) -> None:
        merge(layer, False, adapter_names)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Linear, "merge", once)
        judgement = judged(bench, case, "bfloat16")
    assert judgement.verdict is Verdict.PASSED, judgement
    (note,) = (one for one in judgement.findings if one.check == "merge-differs")
    assert "torch" in note.message
    assert "PEFT" in note.message


def test_a_packed_weight_that_is_not_made_of_the_sum_is_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    case, merge = methods.find("road-4"), road.Linear4bit.merge

    def wrong(layer: Any, *given: Any, **named: Any) -> None:
        merge(layer, *given, **named)
        layer.get_base_layer().weight.data[0] ^= 1

    adapter, base = bench.adapter(case), bench.base_directory(case.base, "bfloat16")
    bench.gate.safe_merge = True
    assert bench.gate.judge(adapter, base, quantization=Quantization.BNB_4BIT).verdict is Verdict.PASSED
    monkeypatch.setattr(road.Linear4bit, "merge", wrong)
    judgement = bench.gate.judge(adapter, base, quantization=Quantization.BNB_4BIT)
    assert_differs(judgement, {"model.layers.0.self_attn.q_proj.weight"}, "packed")


@pytest.mark.parametrize("quantization", [Quantization.BNB_8BIT, Quantization.BNB_4BIT])
def test_a_merge_that_packs_nothing_is_found(quantization, bench, monkeypatch) -> None:
    case = methods.find("lora-linear")
    adapter, base = bench.adapter(case), bench.base_directory(case.base, "bfloat16")
    for kind in (lora.Linear8bitLt, lora.Linear4bit):
        monkeypatch.setattr(kind, "merge", lambda layer, *given, **named: None)
    judgement = bench.gate.judge(adapter, base, quantization=quantization)
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "merge-differs"), judgement


def test_other_scales_of_a_packed_weight_are_found(bench: Bench) -> None:
    def apply(model: nn.Module) -> set[str]:
        path, weight = next((path, one) for path, one in model.named_parameters() if path.endswith("o_proj.weight"))
        state = cast("Any", weight).quant_state
        state.absmax = state.absmax * 1.1
        return {path}

    case = methods.find("road-4")
    base = bench.base_directory(case.base, "bfloat16")
    with changed(apply, "after") as names:
        judgement = bench.gate.judge(bench.adapter(case), base, quantization=Quantization.BNB_4BIT)
    bench.gate.loaded.clear()  # the state is that of the base
    assert_differs(judgement, names, "scales")


# --- rounding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 0.1, 0.01])
def test_roundings_explain_a_sum_and_nothing_else(dtype: torch.dtype, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64, 256, generator=generator).to(dtype)
    delta = size * torch.randn(64, 256, generator=generator)
    exact = base.float() + delta
    for right in (exact.to(dtype), base + delta.to(dtype)):
        assert unexplained(right, exact, base) is None
    for factor in (-1.0, 0.0, 1.1, 1.3, 2.0):
        for expected in (None, exact):
            wrong = unexplained((base.float() + factor * delta).to(dtype), exact, base, expected)
            if expected is not None and size * abs(factor - 1) < 0.2 * torch.finfo(dtype).eps:
                continue  # intermediate roundings can do that
            assert wrong is not None, (factor, expected is None)
            assert wrong[1] == pytest.approx(factor, abs=0.05)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("size", [3e-4, 3e-3, 3e-2])
@pytest.mark.parametrize("name", ["road-linear", "road-4", "frod-linear", "glora-lora", "glora-vector"])
def test_rounded_intermediate_values_explain_a_small_change(name: str, size: float, dtype: str, bench: Bench) -> None:
    """Early in a training, all values of an adapter have changed by about the learning rate."""
    case = dataclasses.replace(methods.find(name), base="llama-tall")
    start = bench.root / "start" / name
    if not start.exists():
        with methods.quiet():
            get_peft_model(copy.deepcopy(bench.base(case.base, "float32")), case.config()).save_pretrained(start)
    generator = torch.Generator().manual_seed(0)
    moved = {
        key: one + size * torch.randn(one.shape, generator=generator).sign() if one.is_floating_point() else one
        for key, one in sorted(load_file(start / methods.WEIGHTS).items())
    }
    adapter = methods.write_variant(start, bench.root / "small" / name / f"{size}", moved)
    judgement = bench.gate.judge(adapter, bench.base_directory(case.base, dtype))
    assert "merge-differs" not in {one.check for one in judgement.findings}, judgement


def test_a_value_far_off_is_not_rounding() -> None:
    base = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = base.float() * 1.5
    final = exact.bfloat16()
    final[3, 5] += 0.5
    assert unexplained(final, exact, base, exact) == (1, pytest.approx(1, abs=0.01))


def test_a_sum_has_no_other_roundings(bench: Bench) -> None:
    """A value of DoRA that is a few units off."""
    fault = Fault(
        lambda merge: one_value(merge, 1.03 * float(merge.after.flatten()[merge.after.numel() // 3])),
        lambda made, _safe: made is torch.bfloat16,
    )
    with fault.made():
        judgement = judged(bench, methods.find("lora-dora"), "bfloat16")
    assert_differs(judgement, {"model.layers.0.self_attn.q_proj.weight"}, "3 % off")
