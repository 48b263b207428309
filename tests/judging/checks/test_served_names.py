"""When served-names fires, and what it says: its messages are in served-names.txt."""

from __future__ import annotations

from dataclasses import replace

from merge_gate.records.measured import ServedClass
from merge_gate.records.terms import Origin
from tests.support.faults import Case
from tests.support.judging.cases import MODULE, Fire, evidence, files, reason, spec
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
    FIRES = (
        Fire(
            ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration", MODULE, WHOLE),
            Origin.ADAPTER,
            evidence(**RENAMED),
            places={"module": MODULE, "measured": (("modules_renamed", 1.0),)},
        ),
    )
    SITUATIONS = (
        ("several modules", (evidence(served=served(**{MODULE: WHOLE, "model.a": "model.language_model.a"})), files())),
    )
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
        (evidence(), files(), spec()),
        (evidence(served=replace(served(**{MODULE: WHOLE}), lacking=())), files(), spec()),
        (evidence(**RENAMED, missing=("a.lora_A.weight",)), files(), spec()),
        (evidence(**RENAMED, refusal=reason("targets_not_found")), files(), spec()),
    )
