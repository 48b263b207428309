"""When keys-missing fires, and what it says: its messages are in keys-missing.txt."""

from typing import Any

from tests.support.judging.cases import LORA_A, LORA_B, MANY, Given, evidence, files, headers, reason
from tests.support.judging.every_check import EveryCheck
from tests.support.judging.releases import LORA_0_6, LORA_0_9, LORA_0_12

BIASES = ("base_model.model.q_proj.base_layer.bias",)
LORA_ONLY = {"bias": "lora_only"}
HEAD = "base_model.model.lm_head.modules_to_save.weight"


def lost(config: dict[str, Any], *names: str) -> Given:
    return Given(evidence(missing=names), files(config=config))


class TestKeysMissing(EveryCheck):
    FIRES = (Given(evidence(missing=(LORA_B,))), Given(evidence(missing=tuple(f"lora.{i}" for i in range(7)))))
    SITUATIONS = {
        "two tensors are missing": lost({}, LORA_A, LORA_B),
        "biases that an old release names otherwise": lost(LORA_0_6 | {"bias": "all"}, *BIASES),
        "biases that a release lost on saving": lost(LORA_0_12 | LORA_ONLY, *BIASES),
        "four biases of a config that says no release": lost(LORA_0_12 | {"bias": "all"}, *BIASES * 4),
        "biases that were not trained": lost(LORA_0_9 | LORA_ONLY, *BIASES),
        "biases of the release that keeps them": lost(LORA_0_9 | LORA_ONLY | {"peft_version": "0.21.2"}, *BIASES),
        "biases of a config that says no release": lost(LORA_0_12 | {"bias": "all"}, *BIASES),
        "one tensor is lost on loading": Given(evidence(missing=(LORA_A,), dropped=(LORA_A,))),
        "two of three are lost on loading": Given(
            evidence(missing=(LORA_A, LORA_B, "x.lora_A.weight"), dropped=(LORA_A, LORA_B))
        ),
        "four of four are lost on loading": Given(evidence(missing=tuple("abcd"), dropped=tuple("abcd"))),
        "missing, of a model whose wrapper was saved": Given(
            evidence(missing=(LORA_A,)), files(tensors=headers("_orig_mod.base_model.model.q_proj.lora_A.weight"))
        ),
        "missing, and wrapped twice": Given(
            evidence(missing=(LORA_A,)),
            files(tensors=headers("base_model.model.base_model.model.q_proj.lora_A.weight", LORA_B)),
        ),
        "missing and unexpected, of a compiled model": Given(
            evidence(missing=(LORA_A,), unexpected=("base_model.model._orig_mod.q_proj.lora_A.weight",)),
            files(tensors=headers("base_model.model._orig_mod.q_proj.lora_A.weight")),
        ),
    }
    SILENT = ("biases that were not trained",)
    REFUSED = (
        reason("tensors_missing", names=(LORA_A,)),
        reason("tensors_missing", names=MANY),
        reason("tensors_missing", names=(HEAD,), trained_whole="['lm_head']"),
        reason("tensors_missing", names=MANY, trained_whole="['lm_head']"),
    )
