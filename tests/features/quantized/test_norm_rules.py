"""Scales count if they were moved into a norm by the rule of the model: w / s, or (1 + w) / s - 1 in Gemma."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from merge_gate.features.quantized.folds import norms_of_one_plus
from tests.support.command import merge_gate, strict_json
from tests.support.models import read_tensors, write_tensors
from tests.support.quantized.checkpoints import saved
from tests.support.quantized.folded import BLOCK, HEAD, HIDDEN, INNER, SETTINGS, folded, quantized

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]


def lay(place: Path, kind: str) -> dict[str, torch.Tensor]:
    """A base of one block and a LoRA adapter; returns the tensors of PEFT's merge."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1, head_dim=HEAD,
        num_attention_heads=HIDDEN // HEAD, num_key_value_heads=HIDDEN // HEAD, tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.2 if parameter.dim() == 1 else 0.02) * torch.randn_like(parameter))
    model.bfloat16().save_pretrained(place / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
        get_peft_model(model, lora).save_pretrained(place / "adapter")
        noise = torch.Generator().manual_seed(1)
        factors = read_tensors(place / "adapter")
        write_tensors(
            place / "adapter", {name: 0.05 * torch.randn(own.shape, generator=noise) for name, own in factors.items()}
        )
        base = getattr(transformers, f"{kind}ForCausalLM").from_pretrained(place / "base", dtype=torch.float32)
        return dict(PeftModel.from_pretrained(base, place / "adapter").merge_and_unload().state_dict())


@pytest.mark.parametrize("is_right", [True, False], ids=["right", "wrong"])
@pytest.mark.parametrize("kind", ["Llama", "Gemma"])
def test_a_norm_that_only_the_wrong_rule_explains_fails(kind: str, is_right: bool, tmp_path: Path) -> None:
    merged = lay(tmp_path, kind)
    block = {name: tensor for name, tensor in merged.items() if name.startswith(BLOCK)}
    moved = folded(block, is_gemma=(kind == "Gemma") is is_right, pairs=False)
    others = {name: tensor.bfloat16() for name, tensor in merged.items() if name not in block}
    config = strict_json(tmp_path / "base" / "config.json") | {"quantization_config": SETTINGS}
    saved(tmp_path / "release", quantized(moved, 8) | others, config)
    answer = merge_gate("verify", "release", "--base", "base", "--adapter", "adapter", "-o", "out", cwd=tmp_path)
    (entry,) = strict_json(tmp_path / "out" / "report.json")["adapters"]
    assert (answer.code, entry["verdict"]) == ((0, "passed") if is_right else (1, "failed")), answer.said
    changed = [one["message"] for one in entry["findings"] if one["check"] == "base-changed"]
    assert bool(changed) is not is_right, answer.said
    assert is_right or f"{BLOCK}input_layernorm.weight" in changed[0]


@pytest.mark.parametrize(("kind", "adds_one"), [
    ("Llama", False), ("Gemma", True), ("Gemma2", True), ("Qwen2", False), ("Nemotron", True), ("Bert", False),
])  # fmt: skip
def test_the_rule_is_that_of_the_model_s_class(kind: str, adds_one: bool) -> None:
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(
            getattr(transformers, f"{kind}Config")(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4)
        )
    norms = {f"{name}.weight" for name, own in model.named_modules() if "norm" in type(own).__name__.lower()}
    assert norms
    assert norms_of_one_plus(model) == (norms if adds_one else set())


def test_a_norm_that_needs_more_than_its_input_adds_nothing() -> None:
    class Gated(nn.Module):
        forward: Callable[..., Any]

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    assert norms_of_one_plus(nn.Sequential(Gated())) == set()
