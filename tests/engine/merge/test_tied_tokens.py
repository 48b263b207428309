"""Trained tokens of an embedding and a head that share a weight: on both sides, or the merge changes more than them.

The judge is PEFT's own forward pass before and after the merge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig
from transformers import AutoModelForCausalLM

from merge_gate.records.terms import Verdict
from tests.support import methods, models
from tests.support.gating import Gate, one_thread

if TYPE_CHECKING:
    from pathlib import Path

EMBEDDING, HEAD = "embed_tokens", "lm_head"
TOKENS, OTHERS = [3, 7], [4, 9]


def lora(tokens: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", trainable_token_indices=tokens)


@pytest.mark.parametrize(
    ("config", "sound"),
    [
        pytest.param(lora(TOKENS), True, id="PEFT's default"),
        pytest.param(lora({EMBEDDING: TOKENS}), True, id="the embedding's, which PEFT links the head to"),
        pytest.param(lora({EMBEDDING: TOKENS, HEAD: TOKENS}), True, id="the same of both"),
        pytest.param(lora({HEAD: TOKENS}), False, id="the head's alone"),
        pytest.param(lora({EMBEDDING: TOKENS, HEAD: OTHERS}), False, id="others of each"),
        pytest.param(
            TrainableTokensConfig(token_indices=TOKENS, target_modules=[HEAD], task_type="CAUSAL_LM"),
            False,
            id="the head's by the method of its own",
        ),
    ],
)
@pytest.mark.parametrize("base", ["llama-tied", "llama"])
def test_tokens_of_one_side_of_a_tied_weight_fail(
    base: str, config: LoraConfig | TrainableTokensConfig, sound: bool, tmp_path: Path
) -> None:
    sound = sound or base == "llama"
    directory, out = tmp_path / "base", tmp_path / "adapter"
    models.make_base(base, directory)
    models.save_adapter(directory, out, config)
    assert merges_into_what_it_computes(directory, out) is sound
    with one_thread():
        judgement = Gate().judge(out, directory)
    verdict = (Verdict.PASSED, None) if sound else (Verdict.FAILED, "tied-weights")
    assert (judgement.verdict, judgement.cause) == verdict, judgement


def merges_into_what_it_computes(base: Path, adapter: Path) -> bool:
    tokens = torch.arange(20)[None]
    with methods.quiet(), torch.no_grad():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
        before = model(tokens).logits
        after = model.merge_and_unload(safe_merge=True)(tokens).logits
    return torch.allclose(before, after, atol=1e-4)
