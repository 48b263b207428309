"""Each road gives what a user of PEFT gets: untrained, overflowing and lopsided adapters, and a PEFT that is broken."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import shutil
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from merge_gate.engine.base.loaded_base import Base
from merge_gate.engine.base.model_class import model_class_for
from merge_gate.engine.blocks.block_merge import measure_merge
from merge_gate.engine.merge import plan
from merge_gate.files.preflight import preflight
from merge_gate.records.measured import Evidence, MeasureOptions
from merge_gate.records.terms import Verdict
from tests.support import methods
from tests.support.command import merge_gate, strict_json
from tests.support.engine.base_headers import stored_tensors
from tests.support.engine.local_bases import load_local
from tests.support.engine.merges import NOT_RUN, merge_adapter
from tests.support.faults import configure, edit
from tests.support.gating import Bench
from tests.support.models import ALL_LINEAR, VARIANTS, Shelf

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.models import Tensors


WEIGHTS = "adapter_model.safetensors"
SAMPLED = MeasureOptions(estimates=True)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(root=tmp_path_factory.mktemp("bench"))


def loaded(directory: Path, adapter: Path, dtype: str = "auto") -> Base:
    model_class = model_class_for(
        str(directory), preflight(str(adapter), allow_pickle=False), stored_tensors(directory)
    )
    return load_local(str(directory), model_class=model_class, label="base", dtype=dtype)


def evidence_of(
    base: Path, adapter: Path, dtype: str = "auto", *, measure_options: MeasureOptions = SAMPLED
) -> Evidence:
    files = preflight(str(adapter), allow_pickle=False)
    return merge_adapter(loaded(base, adapter, dtype), files, measure_options=measure_options, no_forward=NOT_RUN)


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


UNTRAINED: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"]),
    "dora": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["q_proj"]),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules=["q_proj"]),
    "vera": lambda: peft.VeraConfig(r=2, target_modules=["q_proj"]),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=10, target_modules=["q_proj"], init_weights=True),
    "adalora": lambda: peft.AdaLoraConfig(init_r=2, target_r=1, total_step=1, target_modules=["q_proj"]),
    "randlora": lambda: peft.RandLoraConfig(r=2, target_modules=["q_proj"]),
    "shira": lambda: peft.ShiraConfig(r=2, target_modules=["q_proj"]),
    "waveft": lambda: peft.WaveFTConfig(n_frequency=10, target_modules=["q_proj"], init_weights=True),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
    "dora-embedding": lambda: peft.LoraConfig(r=2, target_modules=["embed_tokens"], use_dora=True),
    "pissa": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"),
    "olora": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="olora"),
    **{
        name: methods.find(name).config
        for name in (
            "hira-linear",
            "hira-embedding",
            "adamss-linear",
            "peanut-linear",
            "lora-bdlora",
            "lora-velora",
            "lora-monteclora",
            "lora-mica",
            "gralora-hybrid",
            "tinylora-linear",
            "delora-linear",
            "pvera-linear",
            "supertuning-linear",
            "glora-lora",
            "ia3-linear",
            "miss-linear",
            "miss-bat",
            "trainable-tokens",
        )
    },
}


@pytest.mark.parametrize(
    ("method", "dtype"),
    [*((method, "bfloat16") for method in UNTRAINED), *itertools.product(("lora", "dora"), ("float32", "float16"))],
)
def test_an_untrained_adapter_has_no_effect_on_a_pruned_base(
    method: str, dtype: str, pruned: Path, tmp_path: Path, bench: Bench
) -> None:
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
def test_a_delta_of_a_millionth_is_an_effect(
    name: str, part: str, factor: float | None, tmp_path: Path, bench: Bench
) -> None:
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
    assert judgement.evidence is not None
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
    assert judgement.evidence is not None
    assert judgement.evidence.lost_share is not None
    assert judgement.evidence.lost_share > 0.5, judgement


def test_a_large_delta_of_few_tokens_hides_no_other_loss(shelf: Shelf, tmp_path: Path, bench: Bench) -> None:
    """What rounding leaves of the LoRA is next to nothing; the rows of the tokens come through, and are large."""
    adapter = tmp_path / "adapter"
    shutil.copytree(shelf.adapter("token-rows"), adapter)
    edit(lambda tensors: {name: one * (1e-4 if "lora_B" in name else 1) for name, one in tensors.items()})(adapter)
    judgement = bench.gate.judge(adapter, shelf.base("llama-bfloat16"))
    assert judgement.evidence is not None
    assert judgement.evidence.lost_share is not None
    assert judgement.evidence.lost_share < 0.5
    lost = {one.module.rpartition(".")[2]: one.lost_share for one in judgement.evidence.rounded}
    assert min(lost["q_proj"] or 0, lost["v_proj"] or 0) > 0.9, lost
    assert "rounding-loss" in judgement.warned, judgement


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}], ids=["a head", "biases"])
def test_what_is_trained_whole_is_rounded_before_the_merge(
    settings: dict[str, Any], tmp_path: Path, bench: Bench
) -> None:
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


def test_a_layer_that_adalora_has_pruned_is_not_lost(tmp_path: Path, bench: Bench) -> None:
    base = bench.base_directory("llama", "float32")
    pruned_by_adalora(base, tmp_path, {"q_proj": [False, False], "v_proj": [True, False]})
    shapes = {name: tuple(tensor.shape) for name, tensor in methods.load_file(tmp_path / WEIGHTS).items()}
    assert shapes["base_model.model.model.layers.0.self_attn.q_proj.lora_A"] == (0, 16)
    judgement = bench.gate.judge(tmp_path, base)
    assert judgement.verdict is Verdict.PASSED, judgement
    assert "no-effect" not in judgement.warned, judgement


def test_an_adalora_of_which_nothing_is_left_has_no_effect(tmp_path: Path, bench: Bench) -> None:
    base = bench.base_directory("llama", "float32")
    pruned_by_adalora(base, tmp_path, {"q_proj": [False, False], "v_proj": [False, False]})
    judgement = bench.gate.judge(tmp_path, base)
    assert (judgement.verdict, judgement.cause) == (Verdict.FAILED, "no-effect"), judgement


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


# --- an error rests on a measurement -------------------------------------------------------------------------------


def test_rounding_loss_is_measured_where_a_sample_is_mistaken(shelf: Shelf, tmp_path: Path) -> None:
    """Rows of two kinds: a delta that survives rounding in few rows, one that does not in the others."""
    shutil.copytree(shelf.adapter("tall"), tmp_path / "tall")

    def two_kinds(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor.normal_(generator=torch.Generator().manual_seed(3)).mul_(1e-5)
                tensor[::5].mul_(1e-3)

    edit(two_kinds)(tmp_path / "tall")
    exact = evidence_of(shelf.base("llama-tall"), tmp_path / "tall", "bfloat16", measure_options=MeasureOptions())
    assert not any(merge.estimated for merge in exact.merges)
    weights = load_file(tmp_path / "tall" / WEIGHTS)
    base = transformers.AutoModelForCausalLM.from_pretrained(shelf.base("llama-tall"), dtype=torch.bfloat16)
    config = json.loads((tmp_path / "tall" / "adapter_config.json").read_text())
    lost = delta = 0.0
    for merge in exact.merges:
        prefix = f"base_model.model.{merge.module}"
        exact_delta = weights[f"{prefix}.lora_B.weight"].double() @ weights[f"{prefix}.lora_A.weight"].double()
        exact_delta *= config["lora_alpha"] / config["r"]
        weight = base.get_submodule(merge.module).weight.detach()
        merged = weight + exact_delta.to(torch.bfloat16)
        lost += float((merged.double() - weight.double() - exact_delta).square().sum())
        delta += float(exact_delta.square().sum())
    assert exact.lost_share == pytest.approx(math.sqrt(lost / delta), rel=1e-3)


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

OVERLAY = """
import importlib.abc, importlib.machinery, sys

BROKEN = __BROKEN__

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        methods = [method for method in BROKEN if name == "peft.tuners." + method[0]]
        if not methods:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            for place, owner, method in methods:
                overlay(getattr(module, owner), method, BROKEN[place, owner, method])

        spec.loader.exec_module = exec_module
        return spec

def overlay(owner, method, then):
    own = getattr(owner, method)

    def broken(self, *args, **kwargs):
        result = own(self, *args, **kwargs)
        alpha = self.lora_alpha if method == "merge" else {"default": self.peft_config["default"].lora_alpha}
        exec(then.get(alpha["default"], "pass"), {"self": self, "result": result})
        return result

    setattr(owner, method, broken)

sys.meta_path.insert(0, Finder())
"""
"""Put into the worker by sitecustomize: what an installed PEFT does besides, by the `lora_alpha` of the adapter."""

MERGE, UNLOAD = ("lora.layer", "Linear", "merge"), ("tuners_utils", "BaseTuner", "merge_and_unload")
LOSES_A_ROW = "self.get_base_layer().weight.data = self.get_base_layer().weight.data[1:]"
BROKEN = {
    "nan": (MERGE, "self.get_base_layer().weight.data[0, 0] = float('nan')", "every-projection"),
    "123": (MERGE, "self.get_base_layer().weight.data[0, 0] = 123.0", "every-projection"),
    "a-row-lost": (MERGE, LOSES_A_ROW, "every-projection"),
    "a-row-lost-beside-saved-modules": (MERGE, LOSES_A_ROW, "modules-to-save"),
    "no-norm": (UNLOAD, "del result.model.norm.weight", "every-projection"),
    "no-attention": (UNLOAD, "result.model.layers[1].self_attn = None", "every-projection"),
}
"""Each adapter's method of PEFT, what it does besides, and the adapter's variant."""


@pytest.fixture(scope="module")
def by_a_broken_peft(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command says of good adapters with an installed PEFT that treats each of them in another wrong way."""
    place = tmp_path_factory.mktemp("broken-peft")
    overlaid, work = place / "overlay", place / "work"
    for directory in (overlaid, work):  # the worker finds nothing that lies below the working directory
        directory.mkdir()
    broken: dict[tuple[str, str, str], dict[int, str]] = {MERGE: {}, UNLOAD: {}}
    for alpha, (name, (method, then, variant)) in enumerate(BROKEN.items(), 8):
        shutil.copytree(shelf.adapter(variant), work / name)
        configure(lora_alpha=alpha)(work / name)
        broken[method][alpha] = then
    (overlaid / "sitecustomize.py").write_text(OVERLAY.replace("__BROKEN__", repr(broken)))
    (base,) = {VARIANTS[variant].base for _, _, variant in BROKEN.values()}
    answer = merge_gate(
        "run",
        *BROKEN,
        "--base",
        shelf.base(base),
        "--output",
        "out",
        cwd=work,
        PYTHONPATH=str(overlaid),
    )
    adapters = strict_json(work / "out" / "report.json")["adapters"]
    return {adapter["name"]: adapter | {"said": answer.said} for adapter in adapters}


@pytest.mark.parametrize(("name", "cause"), [("nan", "merged-nonfinite"), ("123", "merge-differs")])
def test_a_peft_that_merges_otherwise_decides(name: str, cause: str, by_a_broken_peft: dict[str, Any]) -> None:
    """An installed PEFT whose Linear.merge writes a value of its own into each merged weight."""
    adapter = by_a_broken_peft[name]
    assert (adapter["verdict"], adapter["cause"]) == ("failed", cause), adapter["said"]
    coverage = adapter["coverage"]
    assert coverage["layers_differing"]
    assert (coverage["layers_in_blocks"], coverage["layers_witnessed"]) == (0, 0)
    assert coverage["layers_by_peft"] == 2 * len(ALL_LINEAR)


@pytest.mark.parametrize("name", ["a-row-lost", "a-row-lost-beside-saved-modules"])
def test_what_was_measured_and_what_there_is_are_counted_apart(name: str, by_a_broken_peft: dict[str, Any]) -> None:
    """A PEFT that loses a row of each weight while it merges: fewer elements were measured than the model has.

    That alone would be an error; what the layers compute fails.
    """
    adapter = by_a_broken_peft[name]
    coverage = adapter["coverage"]
    assert coverage["parameters_checked"] < coverage["parameters_total"], adapter["said"]
    assert (adapter["verdict"], adapter["cause"]) == ("failed", "merge-differs"), adapter["said"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no-norm", "model.norm.weight"),
        ("no-attention", "model.layers.1.self_attn.k_proj.bias"),
    ],
)
def test_a_parameter_that_the_merged_model_lacks_fails(name: str, says: str, by_a_broken_peft: dict[str, Any]) -> None:
    """Counting only what is there would not miss it."""
    adapter = by_a_broken_peft[name]
    assert (adapter["verdict"], adapter["cause"]) == ("failed", "not-mergeable"), adapter["said"]
    assert says in adapter["findings"][0]["message"]


def test_peft_witnesses_each_kind_of_layer(shelf: Shelf) -> None:
    evidence = evidence_of(shelf.base("llama"), shelf.adapter("every-projection"), "bfloat16")
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

    right = evidence_of(shelf.base("llama"), shelf.adapter("every-projection"), "bfloat16")
    monkeypatch.setattr(plan, "measure_merge", nudged)
    evidence = evidence_of(shelf.base("llama"), shelf.adapter("every-projection"), "bfloat16")
    assert len(evidence.differing) == len(right.cross_checked)
    assert evidence.layers_in_blocks == 0
    by_peft, expected = (
        {one.stats.name: (one.stats.minimum, one.stats.maximum) for one in found.merges} for found in (evidence, right)
    )
    assert {name: by_peft[name] for name in expected} == expected


# --- the next adapter of the same config ---------------------------------------------------------------------------


def without(evidence: Evidence) -> Evidence:
    from dataclasses import replace  # noqa: PLC0415

    return replace(evidence, seconds=0.0)


def change(directory: Path, by: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(directory / WEIGHTS)
    by(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("variant", ["every-projection", "dora-all-linear", "conv1d", "embedding", "modules-to-save"])
def test_an_adapter_is_judged_alike_after_others_of_its_config(variant: str, shelf: Shelf, tmp_path: Path) -> None:
    """A sound one, one with other values, one that is broken, one that lacks a tensor, and the first again."""
    directory = shelf.base(VARIANTS[variant].base)
    edits: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
        "first": lambda tensors: None,
        "other": lambda tensors: [tensor.mul_(1.5) for name, tensor in tensors.items() if "_A" in name],
        "broken": lambda tensors: next(iter(tensors.values())).view(-1).fill_(torch.nan),
        "lacking": lambda tensors: tensors.pop(next(iter(tensors))),
        "last": lambda tensors: None,
    }
    for name, by in edits.items():
        shutil.copytree(shelf.adapter(variant), tmp_path / name)
        change(tmp_path / name, by)
    together = loaded(directory, tmp_path / "first")
    for name in edits:
        files = preflight(str(tmp_path / name), allow_pickle=False)
        got = merge_adapter(together, files, measure_options=SAMPLED)
        alone = merge_adapter(loaded(directory, tmp_path / name), files, measure_options=SAMPLED)
        assert repr(without(got)) == repr(without(alone)), name


def test_what_peft_merged_is_not_left_in_the_base(shelf: Shelf) -> None:
    adapter = shelf.adapter("dora-all-linear")
    base = loaded(shelf.base("llama"), adapter)
    before = {name: tensor.clone() for name, tensor in base.tensors.items()}
    for _ in range(2):
        merge_adapter(base, preflight(str(adapter), allow_pickle=False))
    assert all(torch.equal(before[name], tensor) for name, tensor in base.tensors.items())
