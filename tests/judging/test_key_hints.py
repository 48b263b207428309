"""Words for names that the file lacks or has too many: whose fault, and what next."""

from __future__ import annotations

import pytest

from merge_gate.judging.key_hints import names_of_another_kind, of_another_model, wrapped_twice
from merge_gate.records.files import StoredTensor
from tests.support.wording import Wording


@pytest.mark.parametrize("times", [1, 2, 4])
def test_a_model_wrapped_more_than_once(times: int) -> None:
    header = StoredTensor(name="base_model.model." * times + "q_proj.lora_A.weight", dtype="F32", shape=(2, 2))
    hint = wrapped_twice((header,))
    assert (f"{times} times" in hint) == (times > 1)


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["module.base_model.model.q.lora_A.weight", "module.base_model.model.q.lora_B.weight"], "model.module"),
        (["_orig_mod.base_model.model.q.lora_A.weight"], "torch.compile"),
        (["_orig_mod.base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"], None),
        (["base_model.model._orig_mod.q.lora_A.weight"], "_orig_mod."),
        (["base_model.model.module.q.lora_A.weight"], "model.module"),
        (["base_model.model._orig_mod.q.lora_A.weight", "base_model.model.q.lora_B.weight"], None),
        (["base_model.model.layers.0._checkpoint_wrapped_module.q.lora_A.weight"], "_checkpoint_wrapped_module"),
        (["base_model.model.q.lora_A.weight", "base_model.model.h.1._orig_mod.q.lora_A.weight"], "_orig_mod"),
        (["model.embed_tokens.weight", "model.norm.weight"], "full model"),
        (["model.layers.0.q.lora_A.weight", "model.layers.0.q.lora_B.weight"], "lacks base_model.model."),
        (["model.layers.0.q.lora_A.weight", "base_model.model.q.lora_B.weight"], None),
        (["model.norm.weight"], None),
        (["model.embed_tokens.weight", "base_model.model.q.lora_A.weight"], None),
        ([], None),
    ],
)
def test_names_that_no_peft_model_has(names: list[str], hint: str | None) -> None:
    said = names_of_another_kind(tuple(StoredTensor(name=name, dtype="F32", shape=(2, 2)) for name in names))
    assert (hint in said) if hint else not said


@pytest.mark.parametrize(
    ("wanted", "stored", "differs"),
    [
        ("model.layers.0.q", "model.language_model.layers.0.q", True),
        ("model.layers.0.q", "language_model.model.layers.0.q", True),
        ("model.language_model.layers.0.q", "model.layers.0.q", True),
        ("model.layers.0.q", "model.layers.1.q", False),
        ("model.layers.0.q", "model.language_model.layers.1.q", False),
        ("model.language_model.layers.0.q", "language_model.model.layers.0.q", False),
    ],
)
def test_names_of_a_model_for_text_and_images(wanted: str, stored: str, differs: bool, wording: Wording) -> None:
    missing, stray = ([f"base_model.model.{name}.lora_A.weight"] for name in (wanted, stored))
    hint = of_another_model(missing, stray)
    assert bool(hint) is differs
    if differs:
        wording(hint)
