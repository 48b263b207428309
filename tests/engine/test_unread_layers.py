"""Layers whose weight a model reads without calling them: adapters are really trained, and PEFT is the judge.

Each adapter of `UNREAD` computes one thing as it was trained and another when it is merged; each of `READ` does not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from merge_gate.engine.adapter.peft_config import STARTS, starts_at_no_delta
from merge_gate.engine.base import direct_reads
from merge_gate.records.terms import Finding, Severity, Verdict
from tests.support import methods
from tests.support.engine import architectures
from tests.support.engine.plain_merge import merge_error
from tests.support.faults import edit
from tests.support.gating import Gate, Judgement
from tests.support.sampled import sampled

pytestmark = pytest.mark.usefixtures("single_thread")

TEXT = methods.TEXT
VISION = methods.VISION | {"image_size": 8, "patch_size": 4}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _siglip() -> nn.Module:
    config = transformers.SiglipConfig(text_config=TEXT | IDS | {"projection_size": 16}, vision_config=VISION)
    return transformers.SiglipModel(config)


def _siglip_vision() -> nn.Module:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION))


def _mamba() -> nn.Module:
    config = transformers.MambaConfig(
        vocab_size=24, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=4, **IDS
    )
    return transformers.MambaForCausalLM(config)


def _deberta() -> nn.Module:
    config = transformers.DebertaV2Config(
        **TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4, type_vocab_size=0
    )
    return transformers.DebertaV2ForSequenceClassification(config)


def _llama(*, tied: bool = False) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, **IDS, tie_word_embeddings=tied))


def _mixtral() -> nn.Module:
    """Eight tokens, of which each goes to one of 16 experts: some get none."""
    config = transformers.MixtralConfig(
        **TEXT, **IDS, num_key_value_heads=2, num_local_experts=16, num_experts_per_tok=1
    )
    return transformers.MixtralForCausalLM(config)


PIXELS = {"pixel_values": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
TOKENS = {"input_ids": torch.arange(32).reshape(4, 8) % 24}
BASES: dict[str, tuple[Callable[[], nn.Module], dict[str, torch.Tensor]]] = {
    "siglip": (_siglip, PIXELS | TOKENS),
    "siglip-vision": (_siglip_vision, PIXELS),
    "mamba": (_mamba, TOKENS),
    "deberta": (_deberta, TOKENS),
    "llama": (_llama, TOKENS),
    "llama-tied": (lambda: _llama(tied=True), TOKENS),
    "mixtral": (_mixtral, TOKENS),
}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """An adapter after some steps. `off` is how far its merged model's outputs are from those that it was trained to.

    `idle` names modules of which no tensor got a gradient.
    """

    base: Path
    adapter: Path
    off: float
    idle: tuple[str, ...]


def trained(root: Path, base: str, config: peft.PeftConfig, dtype: torch.dtype = torch.float32) -> Trained:
    """Build a base, train an adapter on it, save both; load it as a user does, and compute unmerged and merged."""
    build, inputs = BASES[base]
    torch.manual_seed(0)
    with methods.quiet():
        build().to(dtype).save_pretrained(root / "base")
        kind = type(build())
        model = peft.get_peft_model(kind.from_pretrained(root / "base", dtype="auto"), config)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    goal = None
    for _ in range(5):
        with methods.quiet():
            returned = model.train()(**_fit(inputs, dtype))
        output = next(returned[name] for name in ("logits", "logits_per_image", "pooler_output") if name in returned)
        goal = torch.randn(output.shape) if goal is None else goal
        optimizer.zero_grad()
        (output.float() - goal).pow(2).mean().backward()
        optimizer.step()
    own = {name: one for name, one in model.named_parameters() if one.requires_grad}
    idle = tuple(name for name, one in own.items() if one.grad is None)
    with methods.quiet():
        model.save_pretrained(root / "adapter")
        loaded = peft.PeftModel.from_pretrained(kind.from_pretrained(root / "base", dtype="auto"), root / "adapter")
    off = merge_error(loaded, _fit(inputs, dtype))
    return Trained(base=root / "base", adapter=root / "adapter", off=off, idle=idle)


def _fit(inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: one.to(dtype) if one.is_floating_point() else one for name, one in inputs.items()}


def said(judgement: Judgement) -> Finding | None:
    return next((one for one in judgement.findings if one.check == "not-mergeable"), None)


OUT_PROJ, DT_PROJ, RELATIVE = "head.attention.out_proj", "dt_proj", "rel_embeddings"
ERROR, WARNING = Severity.ERROR, Severity.WARNING


def lora(*targets: str, **options: Any) -> Callable[[], peft.PeftConfig]:
    return lambda: peft.LoraConfig(r=2, target_modules=list(targets), **options)


def fourier(*targets: str) -> Callable[[], peft.PeftConfig]:
    names = "all-linear" if targets == ("all-linear",) else list(targets)
    return lambda: peft.FourierFTConfig(n_frequency=20, target_modules=names)


C3A = peft.C3AConfig(block_size=4, init_weights="gaussian", target_modules=["q_proj", OUT_PROJ])
UNREAD: dict[str, tuple[str, Callable[[], peft.PeftConfig], str, Severity, float]] = {
    "siglip-fourierft": ("siglip", fourier("q_proj", OUT_PROJ), OUT_PROJ, ERROR, 0.1),
    "siglip-lora-random": ("siglip", lora("q_proj", OUT_PROJ, init_lora_weights=False), OUT_PROJ, WARNING, 0.1),
    "siglip-pissa": ("siglip", lora("q_proj", OUT_PROJ, init_lora_weights="pissa"), OUT_PROJ, ERROR, 0.1),
    "siglip-all-linear": ("siglip", fourier("all-linear"), OUT_PROJ, ERROR, 0.05),
    "siglip-vision-fourierft": ("siglip-vision", fourier("q_proj", OUT_PROJ), OUT_PROJ, WARNING, 0.1),
    "siglip-c3a-gaussian": ("siglip", lambda: C3A, OUT_PROJ, ERROR, 0.1),
    "mamba-fourierft": ("mamba", fourier("in_proj", DT_PROJ), DT_PROJ, WARNING, 1e-2),
    "mamba-lora-random": ("mamba", lora("in_proj", DT_PROJ, init_lora_weights=False), DT_PROJ, WARNING, 1e-4),
    "deberta-lora-random": ("deberta", lora("query_proj", RELATIVE, init_lora_weights=False), RELATIVE, WARNING, 1e-4),
}
"""Base, adapter, the layer's name, what the finding weighs, and how far off the merged model is at least."""


@pytest.mark.parametrize("name", UNREAD)
def test_a_start_that_only_the_merge_brings_is_told(name: str, tmp_path: Path) -> None:
    base, config, layer, severity, off = UNREAD[name]
    one = trained(tmp_path, base, config())
    assert one.off > off, "PEFT and transformers merge this as it was trained now: the rule can go"
    assert any(layer in name for name in one.idle)
    judgement = Gate().judge(one.adapter, one.base)
    finding = said(judgement)
    assert (finding.severity, (finding.module or "").endswith(layer)) == (severity, True), judgement
    assert (judgement.verdict is Verdict.FAILED) is (severity is ERROR), judgement


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
READ: dict[str, tuple[str, Callable[[], peft.PeftConfig]]] = {
    "siglip-lora": ("siglip", lora("q_proj", OUT_PROJ)),
    "siglip-dora": ("siglip", lora("q_proj", OUT_PROJ, use_dora=True)),
    "siglip-orthogonal": ("siglip", lora("q_proj", OUT_PROJ, init_lora_weights="orthogonal")),
    "siglip-attention-by-peft": ("siglip-vision", lora("head.attention", init_lora_weights=False)),
    "siglip-fourierft-elsewhere": ("siglip", fourier("q_proj", "v_proj")),
    "siglip-oft": ("siglip", lambda: peft.OFTConfig(oft_block_size=4, target_modules=["q_proj", OUT_PROJ])),
    "mamba-lora": ("mamba", lora("in_proj", DT_PROJ)),
    "mamba-fourierft-elsewhere": ("mamba", fourier("in_proj", "x_proj")),
    "deberta-lora": ("deberta", lora("query_proj", RELATIVE)),
    "llama-fourierft": ("llama", fourier("q_proj", "down_proj", "lm_head")),
    "llama-vera": ("llama", lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "v_proj"])),
    "llama-random": ("llama", lora("q_proj", "embed_tokens", "lm_head", init_lora_weights=False)),
    "llama-tied-random": ("llama-tied", lora("q_proj", "down_proj", init_lora_weights=False)),
    "mixtral-experts": (
        "mixtral",
        lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS, init_lora_weights=False),
    ),
}


@pytest.mark.parametrize("name", sampled(READ, [*READ][::4]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_merges_as_it_was_trained_is_not_told(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, config = READ[name]
    one = trained(tmp_path, base, config(), dtype)
    assert one.off < (1e-5 if dtype is torch.float32 else 0.05)
    judgement = Gate().judge(one.adapter, one.base)
    assert (judgement.verdict, said(judgement)) == (Verdict.PASSED, None), judgement


@pytest.mark.parametrize("name", ["siglip-fourierft", "mamba-fourierft"])
def test_without_a_run_only_torchs_attention_is_reported(name, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(direct_reads, "MOST_CALLS", 0)
    base, config, *_ = UNREAD[name]
    one = trained(tmp_path, base, config())
    judgement = Gate().judge(one.adapter, one.base)
    finding = said(judgement)
    assert (judgement.verdict, finding is not None) == (Verdict.PASSED, base == "siglip"), judgement


def test_an_embedding_that_a_head_shares_is_of_another_check(tmp_path: Path) -> None:
    one = trained(tmp_path, "llama-tied", lora("embed_tokens", init_lora_weights=False)())
    judgement = Gate().judge(one.adapter, one.base)
    assert (judgement.cause, said(judgement)) == ("tied-weights", None), judgement


# --- the start -----------------------------------------------------------------------------------------------------

AT_NO_DELTA = (
    "lora-linear", "lora-dora", "lora-orthogonal", "lora-mica", "lora-eva", "adalora-linear", "ln-norm",
)  # fmt: skip


@pytest.mark.parametrize("name", AT_NO_DELTA)
def test_these_starts_change_nothing(name: str) -> None:
    case = methods.find(name)
    torch.manual_seed(0)
    base = methods.BASES[case.base]()
    before = {name: one.clone() for name, one in methods.values(base).items()}
    with methods.quiet():
        model = peft.get_peft_model(base, case.config())
        assert starts_at_no_delta(model.peft_config["default"])
        after = methods.values(model.merge_and_unload())
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        fourier("q_proj")(),
        lora("q_proj", init_lora_weights=False)(),
        lora("q_proj", init_lora_weights="pissa")(),
        lora("q_proj", init_lora_weights="olora")(),
        peft.VBLoRAConfig(target_modules=["q_proj"], vector_length=4, num_vectors=8),
        peft.C3AConfig(target_modules=["q_proj"], block_size=4),
        peft.C3AConfig(target_modules=["q_proj"], block_size=4, init_weights="gaussian"),
    ],
    ids=lambda config: "-".join(str(config.to_dict().get(key)) for key in ("peft_type", *STARTS[:2])),
)
def test_these_starts_are_looked_into(config: peft.PeftConfig) -> None:
    assert not starts_at_no_delta(config)


def test_an_ordinary_lora_is_not_traced(tmp_path: Path) -> None:
    one = trained(tmp_path, "llama", lora("q_proj", "v_proj")())
    gate = Gate()
    gate.judge(one.adapter, one.base)
    (base,) = gate.loaded.values()
    assert base.direct_reads is None


def test_what_ln_tuning_puts_in_a_layers_place_is_merged(tmp_path: Path) -> None:
    """PEFT's merge of it exchanges two layers, and a second one changes them back: it is tried nowhere else."""
    config = peft.LNTuningConfig(target_modules=["q_proj", OUT_PROJ])
    one = trained(tmp_path, "siglip", config)
    edit(lambda tensors: {name: value + 0.5 for name, value in tensors.items()})(one.adapter)
    judgement = Gate().judge(one.adapter, one.base)
    changed = {merge.stats.name for merge in judgement.evidence.merges if merge.changed}
    assert f"vision_model.{OUT_PROJ}.weight" in changed, judgement


# --- what a forward reads ------------------------------------------------------------------------------------------

APART = {
    "siglip": {OUT_PROJ},
    "mamba": {DT_PROJ, "conv1d"},
    "deberta-v2": set[str](),  # relative attention is off by default
    "llama": set[str](),
    "mixtral": set[str](),
    "qwen3_moe": set[str](),
    "bert": set[str](),
    "t5": set[str](),
    "whisper": set[str](),
    "wav2vec2": set[str](),
    "wavlm": {"q_proj", "k_proj", "v_proj", "attention.out_proj"},
}


@pytest.mark.parametrize("model_type", APART)
def test_a_forward_without_data_shows_what_is_read_apart(model_type: str, tmp_path: Path) -> None:
    model = small(model_type, tmp_path)
    drawn = torch.get_rng_state()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    found = direct_reads.trace(model)
    assert found.complete
    ends = APART[model_type]
    assert all(any(path.endswith(end) for end in ends) for path in found.modules), found
    assert all(any(path.endswith(end) for path in found.modules) for end in ends), found
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def small(model_type: str, directory: Path) -> nn.Module:
    architecture = architectures.build(model_type, directory, torch.float32)
    with methods.quiet():
        model: nn.Module = architecture.model_class.from_pretrained(directory).eval()
    return model


def test_a_model_that_cannot_run_says_what_its_parts_have_shown() -> None:
    model = _siglip()

    class Broken(type(model.vision_model.head)):  # type: ignore[misc]
        __module__ = "transformers.models.siglip.modeling_siglip"

        def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
            assert super().forward(hidden_state).sum().item() > 0  # depends on a value
            return hidden_state

    model.vision_model.head.__class__ = Broken
    found = direct_reads.trace(model)
    assert (found.complete, found.in_logits) == (False, frozenset())
    assert found.modules == {"vision_model.head.attention.out_proj"}


def _reads_metadata(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    weight = model.model.layers[0].self_attn.q_proj.weight
    return hidden.to(weight.dtype) + weight.new_ones(1) + weight.detach().sum()


def _reads_the_embedding(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(hidden, model.model.embed_tokens.weight)


def _reads_the_head(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    return hidden @ model.lm_head.weight.T


@pytest.mark.parametrize(
    ("how", "apart"),
    [(_reads_metadata, set()), (_reads_the_embedding, set()), (_reads_the_head, {"lm_head"})],
    ids=["dtype and what has no gradient", "called as well", "never called"],
)
def test_what_counts_is_what_an_output_depends_on(how: Callable[..., torch.Tensor], apart: set[str]) -> None:
    class Own(transformers.LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": how(self, self.model(input_ids).last_hidden_state)}

    Own.__module__ = "transformers.models.llama.modeling_llama"
    found = direct_reads.trace(Own(transformers.LlamaConfig(**TEXT, **IDS)))
    assert (found.complete, found.modules, found.in_logits) == (True, apart, apart)


def test_a_part_that_a_whole_run_did_not_come_to_runs_alone() -> None:
    class Own(transformers.SiglipModel):
        def forward(self, input_ids: torch.Tensor) -> Any:
            return self.text_model(input_ids)

    Own.__module__ = "transformers.models.siglip.modeling_siglip"
    found = direct_reads.trace(Own(_siglip().config))
    apart = frozenset({f"vision_model.{OUT_PROJ}"})
    assert (found.complete, found.modules, "text_model.head" in found.ran) == (True, apart, True)
    assert not any("vision_model" in path for path in found.ran)


def test_code_of_a_bases_own_is_not_run() -> None:
    class Own(transformers.LlamaForCausalLM):
        def forward(self, *_: Any, **__: Any) -> None:
            pytest.fail("it ran")

    model = Own(transformers.LlamaConfig(**TEXT, **IDS))
    assert direct_reads.trace(model) == direct_reads.DirectReads()


def test_too_many_calls_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_reads, "MOST_CALLS", 20)
    assert not direct_reads.trace(_siglip_vision()).complete
