"""Each road gives what a user of PEFT gets: untrained, overflowing and lopsided adapters, and a PEFT that is broken."""

import copy
import dataclasses
import itertools
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file, save_file

from merge_gate.engine.adapter_evidence import merge
from merge_gate.engine.blocks.block_merge import measure_merge
from merge_gate.engine.merge import plan
from merge_gate.records.measured import Evidence, MeasureOptions
from merge_gate.records.terms import Verdict
from tests.support import methods
from tests.support.engine.local_bases import base_for, edited_adapter
from tests.support.engine.merges import NOT_RUN, comparable, request_for
from tests.support.faults import configure, edit
from tests.support.gating import Bench, Gate
from tests.support.models import ALL_LINEAR, VARIANTS, Shelf, Tensors

WEIGHTS = "adapter_model.safetensors"
SAMPLED = MeasureOptions(estimates=True)


def evidence_of(base: Path, adapter: Path) -> Evidence:
    loaded = base_for(base, adapter, "bfloat16")
    return merge(request_for(loaded, adapter, measure_options=SAMPLED, no_forward=NOT_RUN))


# --- an untrained adapter has no effect ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with zeros of both signs among its weights, as magnitude pruning leaves them."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**methods.DECODER)).eval()
    for parameter in model.parameters():
        parameter.data[parameter.data.abs() < parameter.data.abs().median()] *= 0.0
    assert any(bool(((p == 0) & p.signbit()).any()) for p in model.parameters())
    directory = tmp_path_factory.mktemp("pruned")
    model.save_pretrained(directory)
    return directory


Q = {"target_modules": ["q_proj"]}
UNTRAINED: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=2, **Q),
    "dora": lambda: peft.LoraConfig(r=2, **Q, use_dora=True),
    "loha": lambda: peft.LoHaConfig(r=2, **Q),
    "lokr": lambda: peft.LoKrConfig(r=2, **Q),
    "vera": lambda: peft.VeraConfig(r=2, **Q),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=10, **Q, init_weights=True),
    "adalora": lambda: peft.AdaLoraConfig(init_r=2, target_r=1, total_step=1, **Q),
    "randlora": lambda: peft.RandLoraConfig(r=2, **Q),
    "shira": lambda: peft.ShiraConfig(r=2, **Q),
    "waveft": lambda: peft.WaveFTConfig(n_frequency=10, **Q, init_weights=True),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, **Q),
    "dora-embedding": lambda: peft.LoraConfig(r=2, target_modules=["embed_tokens"], use_dora=True),
    "pissa": lambda: peft.LoraConfig(r=2, **Q, init_lora_weights="pissa"),
    "olora": lambda: peft.LoraConfig(r=2, **Q, init_lora_weights="olora"),
    **{
        name: methods.find(name).config
        for name in (
            "hira-linear", "hira-embedding", "adamss-linear", "peanut-linear", "lora-bdlora", "lora-velora",
            "lora-monteclora", "lora-mica", "gralora-hybrid", "tinylora-linear", "delora-linear", "pvera-linear",
            "supertuning-linear", "glora-lora", "ia3-linear", "miss-linear", "miss-bat", "trainable-tokens",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "dtype"),
    [*((method, "bfloat16") for method in UNTRAINED), *itertools.product(("lora", "dora"), ("float32", "float16"))],
)
def test_an_untrained_adapter_has_no_effect_on_a_pruned_base(method, dtype, pruned, tmp_path, bench) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(pruned, dtype=getattr(torch, dtype))
    with methods.quiet():
        peft.get_peft_model(model, UNTRAINED[method]()).save_pretrained(tmp_path)
    if method in {"fourierft", "waveft"}:
        edit(lambda tensors: {name: torch.zeros_like(tensor) for name, tensor in tensors.items()})(tmp_path)
    judgement = bench.gate.judge(tmp_path, pruned, dtype=dtype)
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "no-effect"), judgement


def test_an_untrained_dora_of_convolutions_has_no_effect(tmp_path: Path, bench: Bench) -> None:
    """PEFT's own road: convolutions have no form in rows."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic")
    transformers.ResNetModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = transformers.ResNetModel.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    with methods.quiet():
        lora = peft.LoraConfig(r=2, target_modules=["convolution"], use_dora=True)
        peft.get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    judgement = bench.gate.judge(tmp_path / "adapter", tmp_path / "base")
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "no-effect"), judgement


@pytest.mark.parametrize(
    ("name", "part", "factor"),
    [
        ("lora-linear", "lora_B.weight", 1e-6),
        ("lora-conv2d", "lora_B.weight", 1e-6),
        ("lora-bdlora", "lora_B.weight", 1e-6),
        ("lora-velora", "lora_B.weight", 1e-6),
        ("lora-monteclora", "lora_B.weight", 1e-6),
        ("loha-linear", "w1_a", 1e-5),
        ("vblora-linear", "bank", 3e-3),
        ("hira-linear", "hira_B", 1e-5),
        ("hira-conv2d", "hira_B", 1e-5),
        ("adamss-linear", "adamss_B", 1e-5),
        ("unilora-linear", "theta_d", 1e-3),
        ("peanut-linear", "peanut_B", 1e-5),
        ("gralora-linear", "gralora_B", 1e-7),
        ("trainable-tokens", "", None),
    ],
)
def test_a_delta_of_a_millionth_is_an_effect(name, part, factor, tmp_path, bench) -> None:
    """What is added to a weight is zero while untrained, so that anything else was trained; on both roads."""
    case = methods.find(name)
    base, adapter = bench.base_directory(case.base, "float32"), bench.adapter(case)
    state = methods.load_file(adapter / methods.WEIGHTS)
    if factor is None:  # one value of one token, moved by one step of float32
        rows = methods.load_file(base / "model.safetensors")["model.embed_tokens.weight"][[1, 5]].clone()
        rows[0, 0] = torch.nextafter(rows[0, 0], torch.tensor(math.inf))
        small = {next(iter(state)): rows}
    else:
        small = {name: tensor * factor for name, tensor in state.items() if part in name}
    judgement = bench.gate.judge(methods.write_variant(adapter, tmp_path, state | small), base)
    assert small
    assert judgement.verdict is Verdict.PASSED, judgement
    ratios = [one.delta_ratio for one in judgement.evidence.merges if one.changed]
    assert any(ratio is not None and 0 < ratio < 2e-6 for ratio in ratios), ratios


@pytest.mark.parametrize("scheme", ["pissa", "olora"])
def test_the_loss_of_pissa_and_olora_is_measured(scheme: str, tmp_path: Path, bench: Bench) -> None:
    """PiSSA and OLoRA take their first factors off the base: the layer's tensor is not the base's any more."""
    base = bench.base_directory("llama", "bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=scheme)
    with methods.quiet():
        peft.get_peft_model(model, config).save_pretrained(tmp_path)
    edit(lambda tensors: {name: tensor * 1.0001 for name, tensor in tensors.items()})(tmp_path)
    judgement = bench.gate.judge(tmp_path, base)
    assert "rounding-loss" in judgement.warned, judgement
    assert judgement.evidence.lost_share is not None
    assert judgement.evidence.lost_share > 0.5, judgement


def test_a_large_delta_of_few_tokens_hides_no_other_loss(shelf: Shelf, tmp_path: Path, bench: Bench) -> None:
    """What rounding leaves of the LoRA is next to nothing; the rows of the tokens come through, and are large."""
    adapter = tmp_path / "adapter"
    shutil.copytree(shelf.adapter("token-rows"), adapter)
    edit(lambda tensors: {name: one * (1e-4 if "lora_B" in name else 1) for name, one in tensors.items()})(adapter)
    judgement = bench.gate.judge(adapter, shelf.base("llama-bfloat16"))
    assert judgement.evidence.lost_share is not None
    assert judgement.evidence.lost_share < 0.5
    lost = {one.module.rpartition(".")[2]: one.lost_share for one in judgement.evidence.rounded}
    assert min(lost["q_proj"] or 0, lost["v_proj"] or 0) > 0.9, lost
    assert "rounding-loss" in judgement.warned, judgement


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}], ids=["a head", "biases"])
def test_what_is_trained_whole_is_rounded_before_the_merge(settings, tmp_path, bench) -> None:
    """In float32, by less than bfloat16 holds: unmerged it computes the same, so the merge has lost nothing."""
    base = bench.base_directory("llama-bias", "bfloat16")
    model, own = (methods.load_base("llama-bias", base) for _ in range(2))
    with methods.quiet():
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], **settings))
        wrapped.save_pretrained(tmp_path)

    def train(tensors: Tensors) -> Tensors:
        generator = torch.Generator().manual_seed(3)
        whole = {name: one.float() for name, one in tensors.items() if "lora_" not in name}
        return {
            **tensors,
            **{name: one + 1e-4 * torch.randn(one.shape, generator=generator) for name, one in whole.items()},
        }

    edit(train)(tmp_path)
    inputs = methods.make_input("llama-bias")
    loaded = methods.load_adapter(own, tmp_path).eval()
    unmerged = methods.compute(loaded, inputs)
    with methods.quiet():
        assert torch.equal(unmerged, methods.compute(loaded.merge_and_unload(safe_merge=True).eval(), inputs))
    judgement = bench.gate.judge(tmp_path, base)
    assert judgement.verdict is Verdict.PASSED, judgement
    assert "rounding-loss" not in judgement.warned, judgement


def pruned_by_adalora(base: Path, directory: Path, kept: dict[str, list[bool]]) -> None:
    """As PEFT saves it after its budget: the ranks that are left, and which they were."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.AdaLoraConfig(init_r=2, target_r=1, total_step=9, target_modules=list(kept), task_type="CAUSAL_LM")
    torch.manual_seed(0)
    with methods.quiet():
        wrapped: Any = peft.get_peft_model(model, config)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        config.rank_pattern = {f"model.layers.0.self_attn.{name}.lora_E": ranks for name, ranks in kept.items()}
        wrapped.save_pretrained(directory)


@pytest.mark.parametrize("is_all", [False, True])
def test_a_layer_that_adalora_has_pruned_is_not_lost(is_all: bool, tmp_path: Path, bench: Bench) -> None:
    """If nothing is left of all layers, the adapter has no effect."""
    base = bench.base_directory("llama", "float32")
    pruned_by_adalora(base, tmp_path, {"q_proj": [False, False], "v_proj": [not is_all, False]})
    shapes = {name: tuple(tensor.shape) for name, tensor in methods.load_file(tmp_path / WEIGHTS).items()}
    assert shapes["base_model.model.model.layers.0.self_attn.q_proj.lora_A"] == (0, 16)
    judgement = bench.gate.judge(tmp_path, base)
    expected = (Verdict.FAILED, "no-effect") if is_all else (Verdict.PASSED, None)
    assert (judgement.verdict, judgement.cause) == expected, judgement
    assert "no-effect" not in judgement.warned, judgement


def test_a_trained_magnitude_alone_is_an_effect(shelf: Shelf, tmp_path: Path, bench: Bench) -> None:
    """DoRA with B = 0 and magnitudes that training has moved."""

    def only_magnitude(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor.zero_()

    shutil.copytree(shelf.adapter("dora"), tmp_path / "dora")
    edit(only_magnitude)(tmp_path / "dora")
    judgement = bench.gate.judge(tmp_path / "dora", shelf.base("llama"))
    assert judgement.verdict is Verdict.PASSED, judgement


TIED: dict[str, tuple[dict[str, Any], str | None]] = {
    "a LoRA on the head": ({"target_modules": ["lm_head"]}, "tied-weights"),
    "an embedding trained whole": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        None,
    ),
    "rows with NaN": ({"target_modules": ["q_proj"], "trainable_token_indices": [1, 3]}, "adapter-nonfinite"),
}


@pytest.mark.parametrize("name", TIED)
def test_what_is_changed_under_another_name_is_changed(name: str, tmp_path: Path, bench: Bench) -> None:
    """A tied tensor goes by its first name: the module that shares it is neither unchanged nor refused."""
    options, cause = TIED[name]
    base = bench.base_directory("llama-tied", "float32")
    with methods.quiet():
        model = peft.get_peft_model(methods.load_base("llama-tied", base), peft.LoraConfig(r=2, **options))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        model.save_pretrained(tmp_path)
    if cause == "adapter-nonfinite":
        edit(lambda tensors: {key: one * (torch.nan if "token" in key else 1) for key, one in tensors.items()})(
            tmp_path
        )
    judgement = bench.gate.judge(tmp_path, base)
    assert judgement.cause == cause, judgement
    assert not judgement.warned, judgement


# --- beyond the range of floats ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", "dora", "embedding"])
def test_a_scaling_beyond_all_range_fails(variant: str, shelf: Shelf, tmp_path: Path, bench: Bench) -> None:
    shutil.copytree(shelf.adapter(variant), tmp_path / "vast")
    configure(lora_alpha=1e200)(tmp_path / "vast")
    judgement = bench.gate.judge(tmp_path / "vast", shelf.base("llama"))
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "merged-nonfinite"), judgement


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float16", "float64"])
def test_nan_fails_in_whatever_dtype_the_file_has(dtype: str, shelf: Shelf, tmp_path: Path, bench: Bench) -> None:
    """torch has no arithmetic for some of them; PEFT loads them all."""
    shutil.copytree(shelf.adapter("plain"), tmp_path / "narrow")

    def narrowed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        next(iter(tensors.values())).view(-1)[-1] = torch.nan
        return {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}

    edit(narrowed)(tmp_path / "narrow")
    judgement = bench.gate.judge(tmp_path / "narrow", shelf.base("llama"))
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "adapter-nonfinite"), judgement


def test_nan_in_running_statistics_of_the_file_is_the_adapters(tmp_path: Path, bench: Bench) -> None:
    torch.manual_seed(0)
    base = transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", num_channels=1)
    )
    base.save_pretrained(tmp_path / "base")
    with methods.quiet():
        model = peft.get_peft_model(copy.deepcopy(base), peft.LNTuningConfig(target_modules=["normalization"]))
        model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    name = next(name for name in tensors if name.endswith("running_mean"))
    tensors[name][0] = torch.nan
    save_file(tensors, tmp_path / "adapter" / WEIGHTS, metadata={"format": "pt"})
    judgement = bench.gate.judge(tmp_path / "adapter", tmp_path / "base")
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "adapter-nonfinite"), judgement
    assert "adapter-nonfinite" not in judgement.warned, judgement


# --- PEFT is the witness -------------------------------------------------------------------------------------------

Then = Callable[[Any, Any], object]
"""Gets what a method of PEFT belongs to, and what it has returned."""


def write(value: float) -> Then:
    return lambda layer, _: layer.get_base_layer().weight.data[0, :1].fill_(value)


def lose_a_row(layer: Any, _: Any) -> None:
    layer.get_base_layer().weight.data = layer.get_base_layer().weight.data[1:]


def lose_a_norm(_: Any, merged: Any) -> None:
    del merged.model.norm.weight


def lose_an_attention(_: Any, merged: Any) -> None:
    merged.model.layers[1].self_attn = None


@pytest.mark.parametrize(
    ("owner", "method", "then", "variant", "cause"),
    [
        (Linear, "merge", write(math.nan), "every-projection", "merged-nonfinite"),
        (Linear, "merge", write(123.0), "every-projection", "merge-differs"),
        (Linear, "merge", lose_a_row, "every-projection", "merge-differs"),
        (Linear, "merge", lose_a_row, "modules-to-save", "merge-differs"),
        (BaseTuner, "merge_and_unload", lose_a_norm, "every-projection", "not-mergeable"),
        (BaseTuner, "merge_and_unload", lose_an_attention, "every-projection", "not-mergeable"),
    ],
)
def test_a_peft_that_merges_otherwise_decides(owner, method, then, variant, cause, shelf, monkeypatch) -> None:
    """Counting only what is there would not miss what is lost."""
    own = getattr(owner, method)

    def broken(self: Any, *given: Any, **named: Any) -> Any:
        returned = own(self, *given, **named)
        then(self, returned)
        return returned

    monkeypatch.setattr(owner, method, broken)
    judgement = Gate().judge(shelf.adapter(variant), shelf.base("llama"))
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, cause), judgement
    evidence = judgement.evidence
    assert evidence is not None
    if then is lose_a_row:
        assert evidence.parameters_checked < evidence.parameters_total
    elif owner is Linear:
        assert evidence.differing
        assert (evidence.layers_in_blocks, evidence.layers_by_peft) == (0, 2 * len(ALL_LINEAR))
    else:
        lost = "model.norm.weight" if then is lose_a_norm else "model.layers.1.self_attn.k_proj.bias"
        assert lost in judgement.findings[0].message


def test_peft_witnesses_each_kind_of_layer(shelf: Shelf) -> None:
    evidence = evidence_of(shelf.base("llama"), shelf.adapter("every-projection"))
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(shelf.base("llama"))
    shapes = {tuple(model.get_submodule(name).weight.shape) for name in evidence.targeted}
    assert (evidence.layers_in_blocks, evidence.layers_by_peft) == (len(evidence.targeted), 0)
    assert len(evidence.cross_checked) == len(shapes)
    assert evidence.differing == ()


def test_extremes_unlike_pefts_send_the_adapter_through_peft(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measuring is at fault here, not the bits: PEFT is the witness of the figures as well."""

    def nudged(*given: Any, **named: Any) -> Any:
        found = measure_merge(*given, **named)
        return dataclasses.replace(found, maximum=found.maximum * 1.5)

    right = evidence_of(shelf.base("llama"), shelf.adapter("every-projection"))
    monkeypatch.setattr(plan, "measure_merge", nudged)
    evidence = evidence_of(shelf.base("llama"), shelf.adapter("every-projection"))
    assert len(evidence.differing) == len(right.cross_checked)
    assert evidence.layers_in_blocks == 0
    by_peft, expected = (
        {one.stats.name: (one.stats.minimum, one.stats.maximum) for one in found.merges} for found in (evidence, right)
    )
    assert {name: by_peft[name] for name in expected} == expected


# --- the next adapter of the same config ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant", ["every-projection", "dora-all-linear", "conv1d", "embedding", "modules-to-save", "rslora"]
)
def test_an_adapter_is_judged_alike_after_others_of_its_config(variant: str, shelf: Shelf, tmp_path: Path) -> None:
    """A sound one, and others that are broken, lack a tensor, or have no effect. Sound ones share a scratch."""
    directory = shelf.base(VARIANTS[variant].base)
    edits: dict[str, Callable[[Tensors], object]] = {
        "first": lambda tensors: None,
        "other": lambda tensors: [tensor.mul_(1.5) for name, tensor in tensors.items() if "_A" in name],
        "untrained": lambda tensors: [tensor.zero_() for name, tensor in tensors.items() if "_B" in name],
        "broken": lambda tensors: next(iter(tensors.values())).view(-1).fill_(torch.nan),
        "lacking": lambda tensors: tensors.pop(next(iter(tensors))),
        "last": lambda tensors: None,
    }
    for name, change in edits.items():
        edited_adapter(shelf.adapter(variant), tmp_path / name, change)
    together, kept = base_for(directory, tmp_path / "first"), []
    for name in edits:
        before = together.template
        got = merge(request_for(together, tmp_path / name, measure_options=SAMPLED))
        kept.append(before is not None and together.template is before)
        alone = merge(request_for(base_for(directory, tmp_path / name), tmp_path / name, measure_options=SAMPLED))
        assert comparable(got) == comparable(alone), name
    if variant == "every-projection":
        assert kept == [False, True, True, False, False, False]
