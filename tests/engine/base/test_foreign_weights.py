"""A base of which transformers would load something else than its own tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import peft
import pytest
import transformers

from merge_gate.engine.base.loaded_base import refuse_foreign_weights
from merge_gate.records.refusals import Undecidable
from tests.support import methods

if TYPE_CHECKING:
    from pathlib import Path


def tiny() -> transformers.LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 8}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1, **sizes))


def test_a_model_of_which_the_files_hold_nothing_is_refused() -> None:
    model = tiny()
    names = {name for name, _ in model.named_parameters()}
    with pytest.raises(Undecidable, match=r"base_of_another_class.*LlamaForCausalLM"):
        refuse_foreign_weights(model, names, "b")
    refuse_foreign_weights(model, names - {"lm_head.weight"}, "b")


def test_a_model_that_brought_an_adapter_is_refused(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    with methods.quiet():
        peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(Undecidable, match="adapter_next_to_base"):
        refuse_foreign_weights(model, set(), "b")
