"""When served-names fires, and what it says: its messages are in served-names.txt."""

from dataclasses import replace

from merge_gate.records.measured import ServedClass
from tests.support.faults import Case
from tests.support.judging.cases import MODULE, Given, evidence, reason
from tests.support.judging.every_check import EveryCheck

WHOLE = "model.language_model.layers.5.self_attn.q_proj"


def served(**names: str) -> ServedClass:
    return ServedClass(
        name="Qwen3_5ForConditionalGeneration",
        loaded="Qwen3_5ForCausalLM",
        names=names,
        lacking=tuple(names),
        scalings={},
        sizes={},
        sources={},
    )


RENAMED = {"served": served(**{MODULE: WHOLE})}


class TestServedNames(EveryCheck):
    FIRES = (Given(evidence(**RENAMED)),)
    SITUATIONS = {
        "several modules": Given(evidence(served=served(**{MODULE: WHOLE, "model.a": "model.language_model.a"})))
    }
    FAULTS = (
        Case(
            "text-class-as-error",
            "text-class",
            cause="served-names",
            origin="adapter",
            entry={"checks": {"served-names": "error"}},
        ),
    )
    HEALTHY = (Case("text-class", "text-class"),)
    QUIET = (
        Given(),
        Given(evidence(served=replace(served(**{MODULE: WHOLE}), lacking=()))),
        Given(evidence(**RENAMED, missing=("a.lora_A.weight",))),
        Given(evidence(**RENAMED, refusal=reason("targets_not_found"))),
    )
