"""Adapters of an encoder that is saved or trained alone, such as T5EncoderModel's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from merge_gate.records.terms import Severity, Verdict
from tests.support import methods
from tests.support.command import entries, merge_gate
from tests.support.gating import Gate, Judgement
from tests.support.models import _noise, read_config, read_tensors, write_config, write_tensors

T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
SWITCH = T5 | {"num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
GEMMA_PART = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
              "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "T5": T5,
    "MT5": T5,
    "UMT5": T5,
    "LongT5": T5 | {"encoder_attention_type": "local"},
    "SwitchTransformers": SWITCH,
    "T5Gemma": {"encoder": GEMMA_PART, "decoder": GEMMA_PART, "is_encoder_decoder": False},
}
"""Each family of transformers that has an encoder's own class and runs on text alone, with a small configuration."""


def lay(place: Path, family: str, base: str, task_type: str | None = "FEATURE_EXTRACTION") -> None:
    """A base saved as the class `base`, and a LoRA of the encoder that was loaded from it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    with methods.quiet():
        getattr(transformers, f"{family}{base}")(config).save_pretrained(place / "base")
        encoder = getattr(transformers, f"{family}EncoderModel").from_pretrained(place / "base")
        targets = ["q_proj", "v_proj"] if family == "T5Gemma" else ["q", "v"]
        model = get_peft_model(encoder, LoraConfig(r=4, target_modules=targets, task_type=task_type))
        _noise(model, 1)
        model.save_pretrained(place / "a")
    write_config(place / "a", read_config(place / "a") | {"auto_mapping": None})


def judged(place: Path) -> Judgement:
    return Gate().judge(place / "a", place / "base")


@pytest.mark.parametrize(("family", "base"), [
    ("T5", "EncoderModel"),
    ("T5", "Model"),
    ("T5Gemma", "EncoderModel"),
    *(pytest.param(family, base, marks=pytest.mark.slow) for family in list(FAMILIES)[1:-1]
      for base in ("EncoderModel", "ForConditionalGeneration")),
])  # fmt: skip
def test_an_adapter_of_an_encoder_passes(family: str, base: str, tmp_path: Path) -> None:
    lay(tmp_path, family, base)
    judgement = judged(tmp_path)
    assert judgement.verdict is Verdict.PASSED, judgement
    assert judgement.evidence.base.loaded_as == f"{family}EncoderModel"
    assert not judgement.warned, judgement
    notes = [
        finding for finding in judgement.findings if finding.check == "base-mismatch" and "alone" in finding.message
    ]
    assert [finding.severity for finding in notes] == ([] if base == "EncoderModel" else [Severity.NOTE])


@pytest.mark.parametrize("base", ["EncoderModel", "ForConditionalGeneration"])
def test_so_does_one_without_a_task_type(base: str, tmp_path: Path) -> None:
    lay(tmp_path, "T5", base, task_type=None)
    judgement = judged(tmp_path)
    assert judgement.verdict is Verdict.PASSED, judgement
    assert not judgement.warned, judgement


@pytest.mark.parametrize("policy", [(), ("--policy", "release")])
def test_the_command_passes_it(policy: tuple[str, ...], tmp_path: Path) -> None:
    lay(tmp_path, "T5", "ForConditionalGeneration")
    answer = merge_gate("run", "a", "--base", "base", *policy, "-o", "out", cwd=tmp_path)
    assert answer.code == 0, answer.said
    (entry,) = entries(tmp_path / "out")
    assert [finding["check"] for finding in entry["findings"] if finding["severity"] != "note"] == []


def half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "block.0." in name}


def encoder_alone(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if ".encoder." in name}


@pytest.mark.parametrize(
    ("kind", "task_type", "targets", "lose", "loaded_as", "cause"),
    [
        ("EncoderModel", "FEATURE_EXTRACTION", ["q", "v"], half, "T5EncoderModel", "keys-missing"),
        ("Model", "FEATURE_EXTRACTION", ["q", "v"], dict, "T5Model", None),
        ("Model", "FEATURE_EXTRACTION", ["q", "v"], half, "T5Model", "keys-missing"),
        ("Model", "FEATURE_EXTRACTION", r".*encoder\.block.*\.(q|v)", dict, "T5Model", None),
        ("ForConditionalGeneration", "SEQ_2_SEQ_LM", ["q", "v"], encoder_alone, "T5ForConditionalGeneration",
         "keys-missing"),
    ],
)  # fmt: skip
def test_what_another_class_lost_is_missing(
    kind: str, task_type: str, targets: Any, lose: Callable[..., Any], loaded_as: str, cause: str | None, tmp_path: Path
) -> None:
    lay(tmp_path, "T5", "ForConditionalGeneration")
    with methods.quiet():
        model = getattr(transformers, f"T5{kind}").from_pretrained(tmp_path / "base")
        peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type=task_type))
        _noise(peft_model, 1)
        peft_model.save_pretrained(tmp_path / "a")
    write_tensors(tmp_path / "a", lose(read_tensors(tmp_path / "a")))
    judgement = judged(tmp_path)
    assert (judgement.cause, judgement.evidence.base.loaded_as) == (cause, loaded_as), judgement
