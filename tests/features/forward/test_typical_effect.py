"""Rounding that seems to take an adapter's effect: for one that acts on other tokens than the made-up ones, and for one
that it really harms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from merge_gate.engine.base.loaded_base import Base, ModelClass
from merge_gate.engine.base.made_up_inputs import candidates
from merge_gate.files.preflight import preflight
from merge_gate.judging.all_checks import judge_merge, measure_options
from merge_gate.records.terms import Severity
from tests.support import methods
from tests.support.engine.local_bases import load_local
from tests.support.engine.merges import merge_adapter
from tests.support.gating import SPEC
from tests.support.sampled import sampled

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
def base(place: Path) -> Base:
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
def judged(place: Path, base: Base, leaves: tuple[str, ...], *, seed: int, trigger: bool) -> list[Severity]:
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
    findings = judge_merge(SPEC, files, merge_adapter(base, files, measure_options=measure_options(SPEC)))
    return [one.severity for one in findings if one.check == "rounding-loss"]


@pytest.mark.parametrize("seed", sampled(range(20), range(4)))
def test_a_trigger_adapter_passes_with_a_warning(seed: int, place: Path, base: Base) -> None:
    leaves = (("q_proj", "v_proj"), ("v_proj",), ("k_proj", "v_proj"), ("q_proj", "k_proj", "v_proj"))[seed % 4]
    assert judged(place, base, leaves, seed=seed, trigger=True) == [Severity.WARNING]


@pytest.mark.parametrize("seed", sampled(range(20), range(4)))
def test_an_adapter_that_rounding_harms_fails(seed: int, place: Path, base: Base) -> None:
    leaves = (("q_proj", "v_proj", "down_proj"), ("gate_proj", "o_proj"), ("up_proj",), ("v_proj", "gate_proj"))[
        seed % 4
    ]
    assert judged(place, base, leaves, seed=seed, trigger=False) == [Severity.ERROR]
