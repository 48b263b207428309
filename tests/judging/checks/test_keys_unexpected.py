"""When keys-unexpected fires, and what it says: its messages are in keys-unexpected.txt."""

from __future__ import annotations

from merge_gate.judging.checks.keys_unexpected import saved_twice
from merge_gate.records.files import StoredTensor
from merge_gate.records.terms import Origin, Severity
from tests.support.judging.cases import LORA_A, MODULE, Fire, evidence, files, headers, judge, spec
from tests.support.judging.every_check import EveryCheck


class TestKeysUnexpected(EveryCheck):
    FIRES = (
        Fire(("optimizer.step",), Origin.ADAPTER, evidence(unexpected=("optimizer.step",))),
        Fire(
            (),
            Origin.ADAPTER,
            evidence(unnamed=("model.norm.weight",)),
            places={"module": "model.norm", "tensor": "model.norm.weight"},
            severity=Severity.WARNING,
        ),
        Fire(
            (LORA_A,),
            Origin.ADAPTER,
            files=files(tensors=(StoredTensor(name=LORA_A, dtype="C64", shape=(2, 2)),)),
            places={"module": MODULE, "tensor": LORA_A},
            severity=Severity.WARNING,
        ),
    )
    SITUATIONS = (
        (
            "two tensors of the base that the config does not name",
            (evidence(unnamed=("a.weight", "b.weight")), files()),
        ),
        (
            "unexpected, and wrapped twice",
            (
                evidence(unexpected=("a.lora_A", "b.lora_B")),
                files(tensors=headers("base_model.model.base_model.model.q_proj.lora_A.weight")),
            ),
        ),
        (
            "unexpected, of layers that were compiled one by one",
            (
                evidence(unexpected=("base_model.model.layers.0._orig_mod.q_proj.lora_A.weight",)),
                files(tensors=headers("base_model.model.layers.0._orig_mod.q_proj.lora_A.weight")),
            ),
        ),
        (
            "unexpected, of a model that was merged before",
            (
                evidence(unexpected=("model.embed_tokens.weight",)),
                files(tensors=headers("model.embed_tokens.weight", "model.norm.weight")),
            ),
        ),
        ("unexpected, and saved twice", (evidence(unexpected=("score.modules_to_save.weight",)), files())),
    )


def test_a_long_list_of_names_is_cut() -> None:
    (finding,) = judge(spec(), files(), evidence(unexpected=tuple(f"stray.{i}" for i in range(1000))))
    assert {"1,000", "997"} <= set(finding.message.split())
    assert len(finding.message) < 400


def test_copies_that_differ() -> None:
    assert "modules_to_save" in saved_twice(["base_model.model.lm_head.modules_to_save.weight"])
    assert not saved_twice(["base_model.model.lm_head.weight"])
