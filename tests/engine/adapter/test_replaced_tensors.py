"""A base with NaN in a tensor that the adapter replaces: what a user of PEFT ends with is finite, or it is not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from merge_gate.records.terms import Verdict
from tests.support import methods, models
from tests.support.gating import Gate, one_thread

if TYPE_CHECKING:
    from pathlib import Path

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"
ROW = 5


def config(**settings: Any) -> LoraConfig:
    return LoraConfig(**({"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings))


SAVED = config(modules_to_save=["lm_head"])
EMBEDDED = config(modules_to_save=["embed_tokens"])
TOKENS = config(trainable_token_indices=[3, ROW])
NORMS = LNTuningConfig(target_modules=["norm"], task_type="CAUSAL_LM")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("base", "broken", "adapter", "mended"),
    [
        pytest.param("llama", EMBEDDING, TOKENS, True, id="trained tokens"),
        pytest.param("llama", EMBEDDING, config(trainable_token_indices=[3, 4]), False, id="other tokens"),
        pytest.param("llama", HEAD, SAVED, True, id="a trained head"),
        pytest.param("llama", HEAD, EMBEDDED, False, id="a trained embedding beside it"),
        pytest.param("llama", BIAS, config(bias="all"), True, id="a trained bias"),
        pytest.param("llama", BIAS, config(), False, id="a bias beside the weight that is merged"),
        pytest.param("llama", NORM, NORMS, True, id="a trained norm"),
        pytest.param("llama", HEAD, config(target_modules=["lm_head"]), False, id="a delta on the head"),
        pytest.param("llama-tied", EMBEDDING, TOKENS, True, id="trained tokens of a tied embedding"),
        pytest.param("llama-tied", EMBEDDING, EMBEDDED, False, id="a tied embedding, whose head keeps the base's"),
        pytest.param("llama-tied", EMBEDDING, config(modules_to_save=["embed_tokens", "lm_head"]), True, id="both"),
    ],
)
def test_a_broken_tensor_that_the_adapter_replaces_is_a_warning(
    base: str, broken: str, adapter: LoraConfig | LNTuningConfig, mended: bool, dtype: str, tmp_path: Path
) -> None:
    directory, out = tmp_path / "base", tmp_path / "adapter"
    models.make_base(base, directory)
    models.save_adapter(directory, out, adapter)
    tensors = models.read_tensors(directory, "model.safetensors")
    tensors[broken][ROW] = torch.nan
    models.write_tensors(directory, tensors, "model.safetensors")
    assert is_finite(out, directory, dtype) is mended
    with one_thread():
        judgement = Gate().judge(out, directory, dtype=dtype)
    of_base = [(one.severity, one.tensor) for one in judgement.findings if one.check == "base-nonfinite"]
    assert of_base == [("warning" if mended else "error", broken)], judgement
    verdict = (Verdict.PASSED, None) if mended else (Verdict.FAILED, "base-nonfinite")
    assert (judgement.verdict, judgement.cause) == verdict, judgement
    assert "no-effect" not in judgement.warned, judgement


def is_finite(adapter: Path, base: Path, dtype: str) -> bool:
    """Of the model that PEFT merges; without its own check, which looks at some layers only."""
    with methods.quiet():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return all(bool(tensor.isfinite().all()) for tensor in methods.values(merged).values())
