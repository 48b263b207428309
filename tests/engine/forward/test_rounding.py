"""How much of an adapter's effect rounding changes: as plain PEFT computes it, and what is not measured."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from merge_gate.engine.adapter_evidence import merge
from merge_gate.engine.base.loaded_base import Base, ModelClass
from merge_gate.engine.base.made_up_inputs import candidates
from merge_gate.files.preflight import preflight
from merge_gate.judging.all_checks import judge_merge, measure_options
from merge_gate.records.measured import Evidence, Forward, MeasureOptions
from merge_gate.records.terms import Severity
from tests.support import methods
from tests.support.engine.local_bases import base_for, load_base, load_local
from tests.support.engine.merges import merge_adapter, request_for
from tests.support.gating import SPEC
from tests.support.models import make_base, read_tensors, save_adapter, write_tensors
from tests.support.sampled import sampled

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it

ALWAYS = -1.0
"""A share of the norm that rounding always takes."""


def lora(**settings: Any) -> peft.LoraConfig:
    usual = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**(usual | settings))


class Trial:
    """A base, and an adapter whose B, or all of it, is `factor` of what is usual here."""

    def __init__(self, root: Path, base: str, config: peft.PeftConfig, factor: float = 1.0, **saving: Any) -> None:
        self.base_directory, self.adapter = root / "base", root / "adapter"
        self.tokens = getattr(config, "trainable_token_indices", None) or ()
        make_base(base, self.base_directory)
        with methods.quiet():
            save_adapter(self.base_directory, self.adapter, config, **saving)
        tensors = read_tensors(self.adapter)
        write_tensors(
            self.adapter, {name: one * (factor if "lora_B" in name else 1.0) for name, one in tensors.items()}
        )

    def loaded(self, dtype: str, load: Callable[..., Base] = load_local) -> Base:
        return base_for(self.base_directory, self.adapter, dtype, load=load)

    def evidence(self, base: Base, *, norm_limit: float = ALWAYS, **options: Any) -> Evidence:
        return merge(request_for(base, self.adapter, measure_options=MeasureOptions(norm_limit=norm_limit), **options))

    def measured(self, base: Base, **options: Any) -> Forward:
        evidence = self.evidence(base, **options)
        assert evidence.refusal is None
        return evidence.forward

    @torch.no_grad()
    def plain(self, dtype: str, rows: int | None = None) -> tuple[float, float]:
        """The effect and its change as a user of transformers and PEFT gets them, in float32 arithmetic."""
        auto = transformers.AutoModelForCausalLM
        if "BertModel" in (self.base_directory / "config.json").read_text():
            auto = transformers.AutoModel

        def base(rows: int | None = None) -> Any:
            model = auto.from_pretrained(self.base_directory, dtype=getattr(torch, dtype))
            if rows is not None:
                model.resize_token_embeddings(rows, mean_resizing=False)
            return model

        with methods.quiet():
            _, inputs = next(candidates(base(), self.tokens))
            unmerged = PeftModel.from_pretrained(base(rows), self.adapter).float()
            merged = PeftModel.from_pretrained(base(rows), self.adapter).merge_and_unload(safe_merge=True)
            models = (base().float(), unmerged, merged.float())
            before, wanted, found = (list(model.eval()(**inputs).values()) for model in models)
        common = [
            (a, *(one[..., : a.shape[-1]] for one in rest)) for a, *rest in zip(before, wanted, found, strict=True)
        ]
        size, effect, change = (
            torch.cat([one.flatten() for one in each]).norm()
            for each in zip(*((a, b - a, c - b) for a, b, c in common), strict=True)
        )
        return float(effect / size), float(change / effect)


IA3 = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
CASES: dict[str, tuple[str, peft.PeftConfig, float, dict[str, Any]]] = {
    "llama": ("llama", lora(), 0.05, {}),
    "tied": ("llama-tied", lora(), 0.05, {}),
    "dora": ("llama", lora(use_dora=True), 0.05, {}),
    "ia3": ("llama", IA3, 1.0, {}),
    "experts": ("mixtral", lora(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]), 0.5, {}),
    "head": ("llama", lora(target_modules=["q_proj"], modules_to_save=["lm_head"]), 0.05, {}),
    "tied head": ("llama-tied", lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"]), 0.05, {}),
    "tokens": ("llama", lora(trainable_token_indices=[3, 5]), 0.05, {}),
    "new tokens": ("llama", lora(), 0.05, {"rows": 70}),
    "bert": ("bert", lora(target_modules=["query", "dense"], task_type=None), 0.5, {}),
    "gpt2": ("gpt2", lora(target_modules=["c_attn", "c_fc"]), 0.05, {}),
}


@pytest.mark.parametrize("name", sampled(CASES, [*CASES][::3]))
def test_the_change_is_what_peft_and_transformers_compute(name: str, tmp_path: Path) -> None:
    base, config, factor, saving = CASES[name]
    trial = Trial(tmp_path, base, config, factor, **saving)
    forward = trial.measured(trial.loaded("bfloat16"))
    effect, change = trial.plain("bfloat16", saving.get("rows"))
    assert forward.effect == pytest.approx(effect, rel=1e-3)
    assert forward.rounding_change == pytest.approx(change, rel=2e-2, abs=1e-5)


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """An adapter of which bfloat16 keeps about a third."""
    return Trial(tmp_path_factory.mktemp("rounding"), "llama", lora(), 0.001)


def test_it_does_not_matter_where_the_values_come_from(trial: Trial) -> None:
    skeleton, in_memory = trial.loaded("bfloat16"), trial.loaded("bfloat16", load_base)
    assert skeleton.lazy is not None
    assert in_memory.lazy is None
    before = {name: one.clone() for name, one in in_memory.tensors.items()}
    assert trial.measured(skeleton) == trial.measured(in_memory)
    assert all(torch.equal(one, before[name]) for name, one in in_memory.tensors.items())
    assert not skeleton.was_misread()


def test_the_figure_decides_and_the_next_reuses_the_copy(trial: Trial) -> None:
    base = trial.loaded("bfloat16")
    evidence = trial.evidence(base)
    change, norm = evidence.forward.rounding_change, evidence.lost_share
    assert change == pytest.approx(norm, rel=0.3)  # of a random delta, rounding takes as much as of its norm
    assert evidence.forward.choices_changed == 0
    assert base.template is not None
    files = preflight(str(trial.adapter), allow_pickle=False)
    found = [one for one in judge_merge(SPEC, files, evidence) if one.check == "rounding-loss"]
    assert [dict(one.measured)["rounding_change"] for one in found] == [change]


def test_it_is_measured_only_if_the_norm_asks_for_it(trial: Trial) -> None:
    base = trial.loaded("bfloat16")
    assert trial.measured(base, norm_limit=0.5).rounding_change is not None
    assert trial.measured(base, norm_limit=0.99).rounding_change is None
    assert trial.measured(base, no_forward="off").rounding_change is None


@pytest.mark.parametrize(("free_bytes", "is_measured"), [(1 << 30, True), (60_000, False)])
def test_it_is_measured_only_if_the_merged_tensors_fit(trial: Trial, free_bytes: int, *, is_measured: bool) -> None:
    forward = trial.measured(trial.loaded("bfloat16"), free_bytes=free_bytes)
    assert (forward.rounding_change is not None, forward.missing) == (is_measured, not is_measured)


def test_an_effect_that_is_lost_in_float32_is_not_measured(tmp_path: Path) -> None:
    trial = Trial(tmp_path, "llama", lora(), 1e-5)
    forward = trial.measured(trial.loaded("bfloat16"))
    assert forward.ran
    assert forward.effect is forward.rounding_change is None


def noisy() -> Any:
    """No two runs are alike: two random numbers may be close by chance."""
    calls = itertools.count()
    return lambda _module, _inputs, output: output * (1 + next(calls) * 1e-3)


def failing(calls: int) -> Any:
    left = iter(range(calls))

    def fail(_module: Any, _inputs: Any, _output: Any) -> None:
        if next(left, None) is None:
            raise RuntimeError("the third forward pass fails")

    return fail


@pytest.mark.parametrize("hook", [pytest.param(noisy(), id="noisy"), pytest.param(failing(3), id="failing")])
def test_a_model_that_runs_differently_costs_the_measurement(trial: Trial, hook: Any) -> None:
    base = trial.loaded("bfloat16")
    base.model.get_submodule("model.norm").register_forward_hook(hook)
    evidence = trial.evidence(base)
    assert evidence.forward.ran
    assert evidence.forward.rounding_change is None
    assert evidence.parameters_checked == evidence.parameters_total > 0


def test_the_experts_are_those_of_the_unmerged_adapter(tmp_path: Path) -> None:
    """An adapter on routers that choose between experts of almost the same score."""
    config = lora(target_modules=["q_proj"], target_parameters=["mlp.gate.weight"])
    trial = Trial(tmp_path, "mixtral", config, 0.005)
    tensors = read_tensors(trial.base_directory, "model.safetensors")
    for name, one in tensors.items():
        if name.endswith("gate.weight"):
            one.copy_(one[:1].expand_as(one).bfloat16())
    write_tensors(trial.base_directory, tensors, "model.safetensors")
    forward = trial.measured(trial.loaded("bfloat16"))
    _, with_other_experts = trial.plain("bfloat16")
    assert forward.choices_changed
    assert forward.rounding_change < 0.9 * with_other_experts


# --- adapters that act on other tokens than the made-up ones, and those that rounding harms ------------------------

LEAK = 0.05
"""The share of a trigger's direction that other tokens have, too."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("typical")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model: Any = transformers.LlamaForCausalLM(config).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    model.save_pretrained(root / "base")
    return root


@pytest.fixture(scope="module")
def loaded(place: Path) -> Base:
    return load_local(str(place / "base"), label="base", model_class=ModelClass(class_name="LlamaForCausalLM"))


def trigger_direction(model: Any, seed: int) -> torch.Tensor:
    """The embedding of a token that is not among the inputs, almost orthogonal to those that are."""
    ids = next(candidates(model))[1]["input_ids"][0]
    rows = model.get_input_embeddings().weight.float()
    token = next(row for row in range(10 * seed, 256) if row not in ids)
    span, _ = torch.linalg.qr(rows[ids].T)
    direction: torch.Tensor = rows[token] - (1 - LEAK) * span @ (span.T @ rows[token])
    return direction / direction.norm()


@torch.no_grad()
def judged(place: Path, loaded: Base, leaves: tuple[str, ...], *, seed: int, trigger: bool) -> list[Severity]:
    """The severity of rounding-loss for an adapter on these layers."""
    generator = torch.Generator().manual_seed(seed)
    model: Any = transformers.LlamaForCausalLM.from_pretrained(place / "base")
    targets = rf".*layers\.0\.self_attn\.({'|'.join(leaves)})" if trigger else list(leaves)
    direction = trigger_direction(model, seed)
    with methods.quiet():
        adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=2, target_modules=targets, task_type="CAUSAL_LM"))
    for name, one in adapted.named_parameters():
        if "lora_" in name:
            one.normal_(0, (4e-4 if trigger else 1e-4) if "_B" in name else 0.1, generator=generator)
        if trigger and "lora_A" in name:
            one.copy_(torch.randn(2, 1, generator=generator) * direction)
    adapted.save_pretrained(place / "adapter")
    files = preflight(str(place / "adapter"), allow_pickle=False)
    findings = judge_merge(SPEC, files, merge_adapter(loaded, files, measure_options=measure_options(SPEC)))
    return [one.severity for one in findings if one.check == "rounding-loss"]


@pytest.mark.parametrize("seed", sampled(range(20), range(4)))
def test_a_trigger_adapter_passes_with_a_warning(seed: int, place: Path, loaded: Base) -> None:
    leaves = (("q_proj", "v_proj"), ("v_proj",), ("k_proj", "v_proj"), ("q_proj", "k_proj", "v_proj"))[seed % 4]
    assert judged(place, loaded, leaves, seed=seed, trigger=True) == [Severity.WARNING]


@pytest.mark.parametrize("seed", sampled(range(20), range(4)))
def test_an_adapter_that_rounding_harms_fails(seed: int, place: Path, loaded: Base) -> None:
    leaves = (("q_proj", "v_proj", "down_proj"), ("gate_proj", "o_proj"), ("up_proj",), ("v_proj", "gate_proj"))[
        seed % 4
    ]
    assert judged(place, loaded, leaves, seed=seed, trigger=False) == [Severity.ERROR]
