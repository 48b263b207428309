"""The proof begins at the files: faults of PEFT before the first merge, and in what a merge starts from.

| fault | found |
|---|---|
| injection or load change a place of the model | by the account of places |
| they write into the memory of the base | before the write, by the watch |
| the adapter's tensors change between load and merge | by their values, right before the merge |
| the strength, tokens, or variant of a layer are not those of the configuration | by the configuration |
| they change on load, or an adapter is not active | by what the injection made of the configuration |
| a layer changes its factors when the proof runs it | by their values, after that |
| factors of two layers exchanged on load | by their names |
| experts in another order than in the file | by the conversions of the base's own class |
| what PiSSA and OLoRA leave of a weight | by the product of their first factors |
| noise and wrong strengths in 16 bits | by the roundings that each class makes |
| one output that is not merged | by itself |
| `combine` with other weights than asked for | by the factors of the files |
"""

import contextlib
import copy
import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LNTuningConfig, LoHaConfig, LoraConfig, get_peft_model
from peft.peft_model import PeftModel
from peft.tuners import hira, loha, lora, vera
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import LoraModel
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.oft.layer import OFTRotationModule
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, core_model_loading

from merge_gate.engine.merge import proof
from merge_gate.records.config import Combine
from merge_gate.records.terms import Quantization, Verdict
from tests.support import methods
from tests.support.engine.merges import NOT_RUN
from tests.support.engine.wrong_merges import Fault
from tests.support.gating import Bench, Gate, Judgement

PROVED = {
    "lora": methods.make_case("from-lora", "llama-bias", "LoraConfig", r=2, target_modules=["q_proj", "v_proj"]),
    "loha": methods.make_case("from-loha", "llama-bias", "LoHaConfig", r=2, target_modules=["q_proj", "v_proj"]),
}
"""A method whose layers go in blocks, and one whose layers PEFT merges."""

Change = Callable[[nn.Module], None]


@pytest.fixture(scope="module")
def bench(bench: Bench) -> Bench:
    return dataclasses.replace(bench, gate=Gate(no_forward=NOT_RUN))


def judged(
    bench: Bench, case: methods.Case, dtype: str = "float32", quantization: Quantization = Quantization.NONE
) -> Judgement:
    for base in bench.gate.loaded.values():
        base.template = base.pattern = None
    return bench.gate.judge(bench.adapter(case), bench.base_directory(case.base, dtype), quantization=quantization)


def assert_differs(judgement: Judgement, where: object = None) -> None:
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "merge-differs"), (where, judgement)


def assert_found(judgement: Judgement, where: tuple[str, str]) -> None:
    """The load that exchanges layers leaves the factors in other places than the file's, too."""
    if where == ("layers exchanged", "load"):
        assert judgement.cause == "keys-missing", judgement
        assert "merge-differs" in {finding.check for finding in judgement.findings}, judgement
    else:
        assert_differs(judgement, where)


def assert_passes(judgement: Judgement, where: object = None) -> None:
    assert judgement.verdict is Verdict.PASSED, (where, judgement)


@contextlib.contextmanager
def peft_changes(step: str, change: Change, *, only: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """PEFT changes the model at the end of its injection, or of its load. `judged` injects for each adapter."""
    owner, name = (BaseTuner, "inject_adapter") if step == "injection" else (PeftModel, "load_adapter")
    own = getattr(owner, name)

    def with_change(self: Any, *given: Any, **named: Any) -> Any:
        returned = own(self, *given, **named)
        if only():
            change(given[0] if step == "injection" else self.get_base_model())
        return returned

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(owner, name, with_change)
        yield


def parameters(model: nn.Module, end: str) -> list[nn.Parameter]:
    """The parameters whose places end so."""
    named = model.named_parameters()
    return [parameter for path, parameter in named if path.replace("base_layer.", "").endswith(end)]


def replaced(end: str, values: Callable[[Tensor], Tensor]) -> Change:
    def change(model: nn.Module) -> None:
        for parameter in parameters(model, end):
            parameter.data = values(parameter.data)

    return change


def written(end: str, write: Callable[[nn.Parameter], object]) -> Change:
    def change(model: nn.Module) -> None:
        with torch.no_grad():
            for parameter in parameters(model, end):
                write(parameter)

    return change


def exchanged(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "q_proj"):
            module.q_proj, module.k_proj = module.k_proj, module.q_proj


def through_storage(parameter: nn.Parameter) -> None:
    torch.empty(0, dtype=parameter.dtype).set_(parameter.data.untyped_storage()).mul_(1.1)


def in_a_thread(parameter: nn.Parameter) -> None:
    thread = threading.Thread(target=lambda: parameter.data.mul_(1.1))
    thread.start()
    thread.join()


NEW: dict[str, Change] = {
    "norms times 1.1": replaced("post_attention_layernorm.weight", lambda values: values * 1.1),
    "layers exchanged": exchanged,
    "a target times 1.1": replaced("q_proj.weight", lambda values: values * 1.1),
    "an embedding reversed": replaced("embed_tokens.weight", lambda values: values.flip(0)),
    "biases of zeros": replaced("v_proj.bias", torch.zeros_like),
}
WRITES: dict[str, Change] = {
    "itself": written("post_attention_layernorm.weight", lambda parameter: parameter.mul_(1.1)),
    "data": written("q_proj.weight", lambda parameter: parameter.data.mul_(1.1)),
    "a view": written("embed_tokens.weight", lambda parameter: parameter.data[1:].view(-1).mul_(1.1)),
    "out": written("k_proj.weight", lambda parameter: torch.neg(parameter.data, out=parameter.data)),
    "set_": written("o_proj.weight", through_storage),
    "another thread": written("o_proj.weight", in_a_thread),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", PROVED)
@pytest.mark.parametrize("step", ["injection", "load"])
def test_a_place_that_peft_changes_before_the_merge_is_found(step, method, dtype, bench) -> None:
    for name, change in NEW.items():
        with peft_changes(step, change):
            assert_found(judged(bench, PROVED[method], dtype), (name, step))
    assert_passes(judged(bench, PROVED[method], dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", PROVED)
@pytest.mark.parametrize("step", ["injection", "load"])
def test_a_write_into_the_base_is_refused_before_it_happens(step, method, dtype, bench) -> None:
    assert_passes(judged(bench, PROVED[method], dtype))
    (base,) = (one for key, one in bench.gate.loaded.items() if key[0].endswith(f"llama-bias/{dtype}"))
    before = {name: tensor.clone() for name, tensor in base.tensors.items()}
    for name, change in WRITES.items():
        with peft_changes(step, change):
            assert_differs(judged(bench, PROVED[method], dtype), (name, step))
        for tensor, values in before.items():
            assert torch.equal(base.tensors[tensor], values), (name, step, tensor)
    assert_passes(judged(bench, PROVED[method], dtype))


@pytest.mark.parametrize("quantization", [Quantization.BNB_8BIT, Quantization.BNB_4BIT])
@pytest.mark.parametrize("step", ["injection", "load"])
def test_a_change_of_a_quantized_base_is_found(step: str, quantization: Quantization, bench: Bench) -> None:
    case = PROVED["lora"]
    assert_passes(judged(bench, case, "bfloat16", quantization))
    changes = {
        "norm": NEW["norms times 1.1"],
        "norm in place": WRITES["itself"],
        "packed in place": written("q_proj.weight", lambda parameter: parameter.data.zero_()),
        "packed": replaced("q_proj.weight", lambda values: values.flip(0)),
        "layers exchanged": exchanged,
    }
    for name, change in changes.items():
        with peft_changes(step, change):
            assert_found(judged(bench, case, "bfloat16", quantization), (name, step))
    assert_passes(judged(bench, case, "bfloat16", quantization))


@pytest.mark.parametrize("method", PROVED)
def test_a_write_at_the_first_load_reaches_no_other_adapter(method: str, bench: Bench, tmp_path: Path) -> None:
    case, loads = PROVED[method], iter([True])
    base = bench.base_directory(case.base, "float32")
    gate = Gate(no_forward=NOT_RUN)
    with peft_changes("load", WRITES["data"], only=lambda: next(loads, False)):
        judgements = [gate.judge(bench.adapter(case), base) for _ in range(3)]
    assert_differs(judgements[0])
    assert judgements[0].findings[0].message.startswith("PEFT's load writes into")
    for judgement in judgements[1:]:
        assert_passes(judgement)
        assert judgement.evidence.merges == bench.gate.judge(bench.adapter(case), base).evidence.merges


def test_a_buffer_that_a_load_copies_onto_itself_is_no_write(bench: Bench) -> None:
    """torch does so with `num_batches_tracked`, if the file has none."""
    case = methods.make_case("saved-norm", "resnet", "LoraConfig", r=2, target_modules=methods.CONV,
                             modules_to_save=["normalization"])  # fmt: skip
    assert_passes(judged(bench, case))


# --- the adapter's tensors -----------------------------------------------------------------------------------------


def factors(model: nn.Module, attribute: str) -> Iterator[nn.Parameter]:
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and hasattr(layer, attribute):
            for held in getattr(layer, attribute).values():
                yield held.weight if isinstance(held, nn.Module) else held


def scaled(attribute: str, factor: float) -> Change:
    def change(model: nn.Module) -> None:
        for parameter in factors(model, attribute):
            parameter.data = parameter.data * factor

    return change


def unloading_after(change: Change) -> Callable[..., Any]:
    unload = BaseTuner._unload_and_optionally_merge

    def with_change(tuner: Any, *given: Any, **named: Any) -> Any:
        change(tuner.model)
        return unload(tuner, *given, **named)

    return with_change


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("name", "attribute"), [("loha-linear", "hada_w1_a"), ("lora-experts", "lora_B")])
def test_factors_that_change_between_load_and_merge_are_found(name, attribute, dtype, bench, monkeypatch) -> None:
    monkeypatch.setattr(BaseTuner, "_unload_and_optionally_merge", unloading_after(scaled(attribute, 1.3)))
    assert_differs(judged(bench, methods.find(name), dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_shared_factor_that_shrinks_with_each_merge_is_found(dtype: str, bench: Bench, monkeypatch) -> None:
    merge = vera.layer.Linear.merge

    def shrinking(layer: Any, *given: Any, **named: Any) -> None:
        merge(layer, *given, **named)
        next(iter(layer.vera_A.values())).data.mul_(0.9)

    case = methods.make_case("vera-four", "llama", "VeraConfig", r=4, target_modules=["q_proj", "k_proj", "o_proj"])
    assert_passes(judged(bench, case, dtype))
    monkeypatch.setattr(vera.layer.Linear, "merge", shrinking)
    assert_differs(judged(bench, case, dtype))


@pytest.mark.parametrize("name", ["vera-two", "fourierft-linear", "shira-linear", "randlora-linear"])
def test_what_peft_makes_of_the_configuration_must_stay_as_injected(name: str, bench: Bench) -> None:
    """Seeded projections, and indices: the file has none of them."""

    def change(model: nn.Module) -> None:
        for layer in model.modules():
            for held in ("vera_A", "indices", "shira_indices", "randlora_A"):
                if isinstance(layer, BaseTunerLayer) and (values := getattr(layer, held, None)) is not None:
                    for key in values:
                        values[key] = values[key].roll(1, -1)

    assert_passes(judged(bench, methods.find(name)))
    with peft_changes("load", change):
        judgement = judged(bench, methods.find(name))
    assert judgement.verdict is Verdict.FAILED, judgement
    assert {finding.check for finding in judgement.findings} & {"merge-differs", "keys-missing"}, judgement


def test_experts_in_another_order_than_in_the_file_are_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversion of the base's own tensors is right, and that of LoRA's is not."""
    case = methods.find("lora-experts-one-by-one")
    healthy = judged(bench, case)
    assert_passes(healthy)
    assert not healthy.evidence.not_compared
    convert = core_model_loading.MergeModulelist.convert

    def reversed_experts(operation: Any, given: dict[str, Any], *others: Any, **named: Any) -> Any:
        if any("lora" in str(value) for value in (*given, *named.values())):
            given = {name: values[::-1] if isinstance(values, list) else values for name, values in given.items()}
        return convert(operation, given, *others, **named)

    monkeypatch.setattr(core_model_loading.MergeModulelist, "convert", reversed_experts)
    judgement = judged(bench, case)
    assert_differs(judgement)
    assert "in another order" in judgement.findings[0].message


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("name", "attribute"), [("lora-linear", "lora_B"), ("lora-linear", "lora_A"), ("loha-linear", "hada_w1_a")]
)
def test_rows_in_another_order_than_in_the_file_are_named_so(name, attribute, dtype, bench) -> None:
    def change(model: nn.Module) -> None:
        for parameter in factors(model, attribute):
            parameter.data = parameter.data.roll(1, 0)

    with peft_changes("load", change):
        judgement = judged(bench, methods.find(name), dtype)
    assert_differs(judgement)
    assert "in another order than the file's: rows, halves" in judgement.findings[0].message


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("eps", [0.5, 1e-2, 1e-4])
def test_rotations_that_a_run_projects_are_those_of_the_file(eps, dtype, bench, tmp_path, monkeypatch) -> None:
    """The last step of a training leaves them outside of the constraint, and each run of PEFT's layer moves them."""
    case = methods.make_case(f"coft-{eps}", "llama", "OFTConfig", oft_block_size=4, coft=True, eps=eps,
                             target_modules=["q_proj"])  # fmt: skip
    state = load_file(bench.adapter(case) / methods.WEIGHTS)
    generator = torch.Generator().manual_seed(1)
    outside = {name: 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}
    methods.write_variant(bench.adapter(case), tmp_path / "outside", outside)
    gate, base = Gate(), bench.base_directory(case.base, dtype)
    assert gate.judge(tmp_path / "outside", base).verdict is Verdict.PASSED
    monkeypatch.setattr(BaseTuner, "_unload_and_optionally_merge", unloading_after(exchanged_rotations))
    assert_differs(gate.judge(tmp_path / "outside", base))


def exchanged_rotations(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, OFTRotationModule):
            module.weight.data = module.weight.data.roll(1, 0)


def test_factors_exchanged_between_two_layers_on_load_are_found(bench: Bench) -> None:
    """The tags, which another load puts in place of values, are exchanged alike."""

    def change(model: nn.Module) -> None:
        for attribute in ("lora_A", "lora_B"):
            first, second = factors(model, attribute)
            first.data, second.data = second.data, first.data

    case = methods.make_case("from-two", "llama", "LoraConfig", r=2, target_modules=["q_proj", "v_proj"])
    assert_passes(judged(bench, case))
    with peft_changes("load", change):
        assert judged(bench, case).cause == "keys-missing"


def set_otherwise(attribute: str, way: Callable[[Any], Any]) -> Change:
    def change(model: nn.Module) -> None:
        for layer in model.modules():
            held = getattr(layer, attribute, None) if isinstance(layer, BaseTunerLayer) else None
            for key in held or ():
                held[key] = way(held[key])

    return change


SETTINGS: dict[str, Change] = {
    "lora-linear": set_otherwise("scaling", lambda scaling: 1.3 * scaling),
    "lora-experts": set_otherwise("scaling", lambda scaling: 1.3 * scaling),
    "loha-linear": set_otherwise("scaling", lambda scaling: 1.3 * scaling),
    "lora-tokens": set_otherwise("token_indices", lambda tokens: tokens[::-1]),
    "lora-tied-tokens": set_otherwise("token_indices", lambda tokens: [token + 1 for token in tokens]),
    "hra-linear": set_otherwise("hra_apply_GS", lambda applies: not applies),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_another_strength_or_token_than_the_configuration_gives_is_found(name: str, bench: Bench) -> None:
    assert_passes(judged(bench, methods.find(name)))
    with peft_changes("load", SETTINGS[name]):
        assert_differs(judged(bench, methods.find(name)))
    assert_passes(judged(bench, methods.find(name)))


OF_CONFIGURATION: dict[str, Change] = {
    name: set_otherwise("scaling", lambda scaling: 1.3 * scaling)
    for name in ("lora-linear", "lora-rslora", "lora-patterns", "lora-experts", "lora-mha", "loha-linear")
} | {"lora-tokens": set_otherwise("token_indices", lambda tokens: tokens[::-1])}


@pytest.mark.parametrize("name", OF_CONFIGURATION)
def test_another_strength_or_token_that_the_injection_makes_is_found(name: str, bench: Bench) -> None:
    assert_passes(judged(bench, methods.find(name)))
    with peft_changes("injection", OF_CONFIGURATION[name]):
        assert_differs(judged(bench, methods.find(name)))


def without_variant(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_variant.clear()


@pytest.mark.parametrize("step", ["injection", "load"])
def test_a_dora_that_peft_makes_a_lora_is_found(step: str, bench: Bench) -> None:
    assert_passes(judged(bench, methods.find("lora-dora")))
    with peft_changes(step, without_variant):
        assert_differs(judged(bench, methods.find("lora-dora")))


@pytest.mark.parametrize("step", ["injection", "load"])
@pytest.mark.parametrize("method", PROVED)
def test_a_layer_whose_adapter_is_inactive_is_found(method: str, step: str, bench: Bench) -> None:
    def change(model: nn.Module) -> None:
        first = next(layer for layer in model.modules() if isinstance(layer, BaseTunerLayer))
        first._active_adapter = []

    assert_passes(judged(bench, PROVED[method]))
    with peft_changes(step, change):
        assert_differs(judged(bench, PROVED[method]))


@pytest.mark.parametrize("way", ["in place", "as a new tensor"])
@pytest.mark.parametrize("name", ["lora-conv2d", "loha-linear"])
def test_a_layer_that_changes_its_factors_when_it_runs_is_found(name, way, bench, monkeypatch) -> None:
    """The proof runs the layer before PEFT merges it."""
    kind, attribute = {"lora-conv2d": (lora.layer.Conv2d, "lora_B"), "loha-linear": (loha.layer.Linear, "hada_w1_a")}[
        name
    ]
    forward = kind.forward

    def changing(layer: Any, *given: Any, **named: Any) -> Any:
        for held in getattr(layer, attribute).values():
            factor = held.weight if isinstance(held, nn.Module) else held
            if way == "in place":
                factor.data.mul_(1.1)
            else:
                factor.data = factor.data * 1.1
        return forward(layer, *given, **named)

    assert_passes(judged(bench, methods.find(name)))
    monkeypatch.setattr(kind, "forward", changing)
    assert_differs(judged(bench, methods.find(name)))


@pytest.mark.parametrize("step", ["injection", "load"])
def test_scales_of_another_weight_in_4_bits_are_found(step: str, bench: Bench) -> None:
    """The scales of both are in the memory of the base."""

    def change(model: nn.Module) -> None:
        for q, v in zip(parameters(model, "q_proj.weight"), parameters(model, "v_proj.weight"), strict=True):
            q.quant_state, v.quant_state = v.quant_state, q.quant_state  # type: ignore[attr-defined]

    with peft_changes(step, change):
        assert_differs(judged(bench, PROVED["lora"], "bfloat16", Quantization.BNB_4BIT))


@pytest.mark.parametrize("factor", [1e-4, 1e-7, 1e4])
def test_experts_with_deltas_at_the_ends_of_float16_are_in_their_places(factor: float, bench: Bench) -> None:
    """Their product is rounded to steps of 6e-8, or becomes infinite."""
    case = methods.find("lora-experts-one-by-one")
    state = {name: tensor * factor for name, tensor in load_file(bench.adapter(case) / methods.WEIGHTS).items()}
    adapter = methods.write_variant(bench.adapter(case), bench.root / f"{case.name}-{factor}", state)
    judgement = bench.gate.judge(adapter, bench.base_directory(case.base, "float16"))
    assert "merge-differs" not in {finding.check for finding in judgement.findings}, judgement


# --- what the injection rewrites by definition ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", methods.DTYPES)
@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_what_is_left_of_a_weight_is_compared(name: str, dtype: str, bench: Bench, monkeypatch) -> None:
    case = methods.find(f"lora-{name}")
    assert_passes(judged(bench, case, dtype))
    initialize = getattr(LoraLayer, f"{name}_init")

    def wrong(layer: Any, *given: Any) -> None:
        initialize(layer, *given)
        layer.get_base_layer().weight.data *= 1.1

    monkeypatch.setattr(LoraLayer, f"{name}_init", wrong)
    assert_differs(judged(bench, case, dtype))


@pytest.mark.parametrize("name", ["pissa", "olora"])
@pytest.mark.parametrize(
    ("targets", "cause"), [(["lm_head"], "tied-weights"), (["lm_head", "embed_tokens"], "not-mergeable")]
)
def test_what_is_left_of_a_tied_weight_is_its_place_too(name, targets, cause, bench: Bench) -> None:
    """The embedding, which has no layer of its own, has the same tensor."""
    case = methods.make_case(
        f"tied-{name}-{len(targets)}", "llama-tied", "LoraConfig", r=2, target_modules=targets, init_lora_weights=name
    )
    assert judged(bench, case).cause == cause


def test_a_rewritten_weight_without_an_identity_is_named(bench: Bench) -> None:
    evidence = judged(bench, methods.find("lora-kasa")).evidence
    assert evidence.not_compared == (
        ("model.layers.0.self_attn.q_proj", "its initialization changes the weight in a way that nothing proves"),
    )


# --- a longer vocabulary -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", methods.DTYPES)
def test_the_biases_of_a_longer_vocabulary_may_be_a_row(dtype: str, bench: Bench) -> None:
    """BART keeps them as a buffer, which grows with the embedding, and becomes float32."""
    directory, adapter = bench.root / f"bart-{dtype}", bench.root / f"of-bart-{dtype}"
    layers = {f"{end}_{name}": value for end in ("encoder", "decoder")
              for name, value in {"layers": 1, "ffn_dim": 24, "attention_heads": 2}.items()}  # fmt: skip
    model = BartForConditionalGeneration(BartConfig(vocab_size=24, d_model=16, max_position_embeddings=16, **layers))
    model.to(methods.DTYPES[dtype]).save_pretrained(directory)
    model.resize_token_embeddings(26, mean_resizing=False)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["shared"], init_lora_weights=False)
    with methods.quiet():
        get_peft_model(model, config).save_pretrained(adapter)
    assert_passes(bench.gate.judge(adapter, directory))


# --- batch norms ---------------------------------------------------------------------------------------------------


def batch_norm(bench: Bench, dtype: str) -> Path:
    """LN tuning of a batch norm, whose running statistics have moved in training."""
    directory = bench.root / "batch-norm" / dtype
    if not directory.exists():
        target = "encoder.stages.1.layers.0.layer.0.normalization"
        with methods.quiet():
            model: Any = get_peft_model(
                copy.deepcopy(bench.base("resnet", dtype)), LNTuningConfig(target_modules=[target])
            )
        for layer in model.modules():
            for trained in layer.ln_tuning_layers.values() if isinstance(layer, LNTuningLayer) else ():
                trained.running_mean += 0.3
                trained.running_var *= 1.5
                trained.weight.data += 0.1
        model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("dtype", methods.DTYPES)
def test_a_batch_norm_with_moved_statistics_passes(dtype: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, base = batch_norm(bench, dtype), bench.base_directory("resnet", dtype)
    assert_passes(bench.gate.judge(adapter, base))
    merge = LNTuningLayer.merge

    def wrong(layer: Any, *given: Any, **named: Any) -> None:
        merge(layer, *given, **named)
        layer.base_layer.running_mean *= 1.1

    monkeypatch.setattr(LNTuningLayer, "merge", wrong)
    assert_differs(bench.gate.judge(adapter, base))


# --- 16 bits -------------------------------------------------------------------------------------------------------


def noise(weight: Tensor, share: float = 0.02) -> Tensor:
    signs = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).sign()
    return weight + share * weight.abs().max() * signs.to(weight.dtype)


IN_16 = {
    "loha-linear": (LycorisLayer, lambda merge: noise(merge.after)),
    "lora-experts": (lora.layer.ParamWrapper, lambda merge: noise(merge.after)),
    "lora-experts-one": (lora.layer.ParamWrapper, lambda merge: merge.by(1.3)),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", IN_16)
def test_one_more_rounding_gives_no_method_a_looser_limit(name: str, dtype: str, bench: Bench) -> None:
    """The multiplication by one is another operation in 16 bits."""
    kind, way = IN_16[name]
    fault = Fault(lambda merge: way(merge) * 1, lambda made, _safe: made is methods.DTYPES[dtype])
    with fault.made(kind):
        judgement = judged(bench, methods.find(name), dtype)
    assert fault.broken
    assert_differs(judgement)


@pytest.mark.parametrize("std", [0.03, 0.06])
def test_hira_with_another_strength_in_16_bits_is_found(std: float, bench: Bench) -> None:
    """Changes of 0.2 % and 0.9 % of the weight."""
    case = methods.make_case(f"hira-{std}", "llama-tall", "HiraConfig", r=4, target_modules=["up_proj", "down_proj"])
    with methods.quiet():
        model: Any = get_peft_model(copy.deepcopy(bench.base(case.base, "float32")), case.config())
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "hira" in name:
            parameter.data += std * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(bench.root / case.name)
    base = bench.base_directory(case.base, "bfloat16")
    healthy = bench.gate.judge(bench.root / case.name, base)
    assert "merge-differs" not in {finding.check for finding in healthy.findings}, healthy
    for factor in (-1.0, 0.0, 1.5):
        fault = Fault(lambda merge, factor=factor: merge.by(factor), lambda made, _safe: made is torch.bfloat16)
        with fault.made(hira.layer.Linear):
            judgement = bench.gate.judge(bench.root / case.name, base)
        assert "merge-differs" in {finding.check for finding in judgement.findings}, (factor, judgement)


# --- each output by itself -----------------------------------------------------------------------------------------

WIDE: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(8, 32_003), (32_002,)),
    "convolution": (nn.Conv2d(2, 8_003, 1), (8_002,)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", WIDE)
def test_the_last_output_is_compared_by_itself(name: str) -> None:
    """A row of 32,003 has 0.56 % of the norm, which is below the limit of a whole layer."""
    module, rows = WIDE[name]
    model: Any = get_peft_model(
        nn.Sequential(copy.deepcopy(module)), LoHaConfig(r=2, target_modules=["0"], init_weights=False)
    )
    layer = next(one for one in model.modules() if isinstance(one, LycorisLayer))
    before, weight = proof.unmerged(layer, torch.device("cpu")), layer.get_base_layer().weight
    was = weight.data.clone()
    layer.merge()
    healthy = before.compared("0", "Linear", layer.base_layer)
    assert not proof.differs(healthy)
    for row in rows:
        weight.data[row] = was[row]
    assert proof.differs(before.compared("0", "Linear", layer.base_layer))


@torch.no_grad()
def test_each_output_of_attention_is_compared_by_itself() -> None:
    model: Any = get_peft_model(
        nn.Sequential(nn.MultiheadAttention(600, 2)), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    layer = next(one for one in model.modules() if isinstance(one, lora.layer.MultiheadAttention))
    before = proof.unmerged(layer, torch.device("cpu"))
    was = layer.base_layer.out_proj.base_layer.weight.data.clone()
    layer.merge()
    assert not proof.differs(before.compared("0", "MultiheadAttention", layer.base_layer))
    layer.base_layer.out_proj.base_layer.weight.data[-1] = was[-1]
    assert proof.differs(before.compared("0", "MultiheadAttention", layer.base_layer))


# --- combinations --------------------------------------------------------------------------------------------------

OTHER_WEIGHTS: dict[str, Callable[[list[float]], list[float]]] = {
    "of minus one": lambda weights: [-1.0] * len(weights),
    "10 % off": lambda weights: [1.1 * weight for weight in weights],
    "of one": lambda weights: [1.0] * len(weights),
}


@pytest.mark.parametrize("way", OTHER_WEIGHTS)
@pytest.mark.parametrize("method", ["cat", "linear"])
def test_a_combination_with_other_weights_is_found(method: str, way: str, bench: Bench, monkeypatch) -> None:
    members = tuple(bench.adapter(dataclasses.replace(PROVED["lora"], name=f"member-{number}")) for number in (0, 1))
    base = bench.base_directory(PROVED["lora"].base, "float32")
    combine = Combine(method=method, adapters=("one", "two"), weights=(0.7, 0.2))
    assert_passes(bench.gate.combine(members, base, combine))
    add = LoraModel.add_weighted_adapter

    def wrong(model: Any, adapters: list[str], weights: list[float], *given: Any, **named: Any) -> Any:
        return add(model, adapters, OTHER_WEIGHTS[way](weights), *given, **named)

    monkeypatch.setattr(LoraModel, "add_weighted_adapter", wrong)
    assert_differs(bench.gate.combine(members, base, combine))


@pytest.mark.parametrize("method", ["cat", "linear"])
def test_a_combination_of_members_with_another_strength_is_found(method: str, bench: Bench) -> None:
    members = tuple(bench.adapter(dataclasses.replace(PROVED["lora"], name=f"member-{number}")) for number in (0, 1))
    base = bench.base_directory(PROVED["lora"].base, "float32")
    combine = Combine(method=method, adapters=("one", "two"), weights=(0.7, 0.2))
    with peft_changes("load", set_otherwise("scaling", lambda scaling: 1.3 * scaling)):
        assert_differs(bench.gate.combine(members, base, combine))


def scaled_members(bench: Bench, factor: float) -> tuple[Path, ...]:
    members = []
    for number in (0, 1):
        adapter = bench.adapter(dataclasses.replace(PROVED["lora"], name=f"member-{number}"))
        state = {name: tensor * factor for name, tensor in load_file(adapter / methods.WEIGHTS).items()}
        members.append(methods.write_variant(adapter, bench.root / f"member-{number}-{factor}", state))
    return tuple(members)


@pytest.mark.parametrize("factor", [1e-4, 1e-7, 1e7])
def test_a_combination_in_float16_of_factors_at_its_ends_is_right(factor: float, bench: Bench) -> None:
    """PEFT puts `cat` into factors of the base's dtype: float16 has steps of 6e-8, and 65,504 at most."""
    members, base = scaled_members(bench, factor), bench.base_directory(PROVED["lora"].base, "float16")
    judgement = bench.gate.combine(members, base, Combine(method="cat", adapters=("one", "two"), weights=(0.7, 0.2)))
    assert "merge-differs" not in {finding.check for finding in judgement.findings}, judgement


def test_a_combination_that_changes_before_the_merge_is_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution does not go in blocks, whose factors are those of the plan."""
    case = methods.find("lora-conv2d")
    members = tuple(bench.adapter(dataclasses.replace(case, name=f"convolution-{number}")) for number in (0, 1))
    base = bench.base_directory(case.base, "float32")
    combine = Combine(method="cat", adapters=("one", "two"), weights=(0.7, 0.2))
    assert_passes(bench.gate.combine(members, base, combine))
    monkeypatch.setattr(BaseTuner, "_unload_and_optionally_merge", unloading_after(scaled("lora_B", 1.3)))
    assert_differs(bench.gate.combine(members, base, combine))


@pytest.mark.parametrize("method", ["svd", "ties"])
def test_of_other_methods_the_report_says_that_peft_alone_vouches(method: str, bench: Bench) -> None:
    members = tuple(bench.adapter(dataclasses.replace(PROVED["lora"], name=f"member-{number}")) for number in (0, 1))
    base = bench.base_directory(PROVED["lora"].base, "float32")
    combine = Combine(method=method, adapters=("one", "two"), weights=(0.7, 0.2), density=0.5)
    evidence = bench.gate.combine(members, base, combine).evidence
    assert {reason for _, reason in evidence.not_compared} == {f"PEFT alone vouches for a combination by {method}"}
    assert len(evidence.not_compared) == 2


# --- runs on made-up inputs ----------------------------------------------------------------------------------------


def test_a_write_in_a_run_on_made_up_inputs_fails_the_adapter_alone(bench: Bench, monkeypatch) -> None:
    """The forward of PEFT's layer writes into the weight of the base. The proof runs layers on copies."""
    case, gate = methods.find("lora-linear"), Gate()
    directory = bench.base_directory(case.base, "float16")
    healthy = gate.judge(bench.adapter(case), directory)
    assert_passes(healthy)
    assert healthy.evidence.forward.ran
    (base,) = gate.loaded.values()
    before = {name: tensor.clone() for name, tensor in base.tensors.items()}
    own, forward = {tensor.data_ptr() for tensor in base.tensors.values()}, lora.layer.Linear.forward

    def writing(layer: Any, *given: Any, **named: Any) -> Any:
        if layer.get_base_layer().weight.data_ptr() in own:
            layer.get_base_layer().weight.data.mul_(1.1)
        return forward(layer, *given, **named)

    with monkeypatch.context() as patched:
        patched.setattr(lora.layer.Linear, "forward", writing)
        judgement = gate.judge(bench.adapter(case), directory)
    assert_differs(judgement)
    assert judgement.findings[0].message.startswith("PEFT's forward run writes into")
    assert all(torch.equal(base.tensors[name], values) for name, values in before.items())
    assert gate.judge(bench.adapter(case), directory).evidence.merges == healthy.evidence.merges


@pytest.mark.parametrize("way", ["in place", "as a new tensor"])
def test_factors_that_change_in_a_run_on_made_up_inputs_reach_no_merge(way: str, bench: Bench, monkeypatch) -> None:
    case, gate, forward, calls = methods.find("lora-linear"), Gate(), lora.layer.Linear.forward, iter([True])
    directory = bench.base_directory(case.base, "float16")
    healthy = gate.judge(bench.adapter(case), directory)

    def changing(layer: Any, *given: Any, **named: Any) -> Any:
        factor = layer.lora_B["default"].weight
        if next(calls, False):
            factor.data = factor.data.mul_(1.1) if way == "in place" else factor.data * 1.1
        return forward(layer, *given, **named)

    monkeypatch.setattr(lora.layer.Linear, "forward", changing)
    judgement = gate.judge(bench.adapter(case), directory)
    assert not next(calls, False)
    assert_passes(judgement)
    assert judgement.evidence.merges == healthy.evidence.merges


def test_a_trained_copy_that_the_load_leaves_inactive_is_found(bench: Bench) -> None:
    case = methods.find("lora-lm-head-saved")

    def change(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module._active_adapter = []

    assert_passes(judged(bench, case))
    with peft_changes("load", change):
        assert_differs(judged(bench, case))
