"""Words for names that the file lacks or has too many: whose fault, and what next."""

from __future__ import annotations

from typing import Any

import pytest

from merge_gate.files.adapter_config import recorded
from merge_gate.judging.checks.keys_missing import missing_words
from merge_gate.judging.checks.keys_unexpected import saved_twice
from merge_gate.judging.key_hints import names_of_another_kind, of_another_model, wrapped_twice
from merge_gate.records.files import StoredTensor
from tests.support.judging.keys import BIASES, LORA_0_9, LORA_0_12, OLD
from tests.support.wording import Wording


@pytest.mark.parametrize(
    ("config", "missing", "follows", "hint"),
    [
        (LORA_0_12, ("base_model.model.q_proj.lora_A.weight",), "initialized", "unwrap"),
        (LORA_0_12, BIASES, "biases", "0.21"),
        (LORA_0_12 | {"bias": "all"}, BIASES, "biases", "save_pretrained"),
        (LORA_0_9 | {"peft_version": "0.21.2"}, BIASES, "biases", "save_pretrained"),
        (OLD | {"bias": "all"}, BIASES, "base_layer", "q_proj.base_layer.bias"),
    ],
)
def test_missing(config: dict[str, Any], missing: tuple[str, ...], follows: str, hint: str) -> None:
    got_follows, got_hint = missing_words(recorded(config), missing)
    assert follows in got_follows
    assert hint in got_hint


def test_biases_that_were_never_trained_are_not_missed() -> None:
    assert missing_words(recorded(LORA_0_9), BIASES) == ("", "")
    assert missing_words(recorded(LORA_0_9), (*BIASES, "base_model.model.q_proj.lora_A.weight")) != ("", "")


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
        (
            ["base_model.model.q.lora_A.weight", "base_model.model.h.1._orig_mod.q.lora_A.weight"],
            "_orig_mod",
        ),
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


def test_copies_that_differ() -> None:
    assert "modules_to_save" in saved_twice(["base_model.model.lm_head.modules_to_save.weight"])
    assert not saved_twice(["base_model.model.lm_head.weight"])


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
