"""When keys-missing fires, and what it says: its messages are in keys-missing.txt."""

from __future__ import annotations

from typing import Any

import pytest

from merge_gate.files.adapter_config import recorded
from merge_gate.judging.checks.keys_missing import missing_words
from merge_gate.records.files import AdapterFiles
from merge_gate.records.measured import Evidence
from merge_gate.records.terms import Origin
from tests.support.judging.cases import LORA_A, LORA_B, MANY, MODULE, Fire, evidence, files, headers, reason
from tests.support.judging.every_check import EveryCheck
from tests.support.judging.keys import BIASES, LORA_0_9, LORA_0_12, OLD

HEAD = "base_model.model.lm_head.modules_to_save.weight"


def lost(config: dict[str, Any], *names: str) -> tuple[Evidence, AdapterFiles]:
    return evidence(missing=names), files(config=config)


class TestKeysMissing(EveryCheck):
    FIRES = (
        Fire((LORA_B,), Origin.ADAPTER, evidence(missing=(LORA_B,)), places={"module": MODULE, "tensor": LORA_B}),
        Fire(("lora.0",), Origin.ADAPTER, evidence(missing=tuple(f"lora.{i}" for i in range(7)))),
    )
    SITUATIONS = (
        ("two tensors are missing", lost({}, LORA_A, LORA_B)),
        ("biases that an old release names otherwise", lost(OLD | {"bias": "all"}, *BIASES)),
        ("biases that a release lost on saving", lost(LORA_0_12, *BIASES)),
        ("four biases of a config that says no release", lost(LORA_0_12 | {"bias": "all"}, *BIASES * 4)),
        ("biases that were not trained", lost(LORA_0_9, *BIASES)),
        ("biases of the release that keeps them", lost(LORA_0_9 | {"peft_version": "0.21.2"}, *BIASES)),
        ("biases of a config that says no release", lost(LORA_0_12 | {"bias": "all"}, *BIASES)),
        ("one tensor is lost on loading", (evidence(missing=(LORA_A,), dropped=(LORA_A,)), files())),
        (
            "two of three are lost on loading",
            (evidence(missing=(LORA_A, LORA_B, "x.lora_A.weight"), dropped=(LORA_A, LORA_B)), files()),
        ),
        ("four of four are lost on loading", (evidence(missing=tuple("abcd"), dropped=tuple("abcd")), files())),
        (
            "missing, of a model whose wrapper was saved",
            (evidence(missing=(LORA_A,)), files(tensors=headers("_orig_mod.base_model.model.q_proj.lora_A.weight"))),
        ),
        (
            "missing, and wrapped twice",
            (
                evidence(missing=(LORA_A,)),
                files(tensors=headers("base_model.model.base_model.model.q_proj.lora_A.weight", LORA_B)),
            ),
        ),
        (
            "missing and unexpected, of a compiled model",
            (
                evidence(missing=(LORA_A,), unexpected=("base_model.model._orig_mod.q_proj.lora_A.weight",)),
                files(tensors=headers("base_model.model._orig_mod.q_proj.lora_A.weight")),
            ),
        ),
    )
    SILENT = ("biases that were not trained",)
    REFUSED = (
        reason("tensors_missing", names=(LORA_A,)),
        reason("tensors_missing", names=MANY),
        reason("tensors_missing", names=(HEAD,), trained_whole="['lm_head']"),
        reason("tensors_missing", names=MANY, trained_whole="['lm_head']"),
    )


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
