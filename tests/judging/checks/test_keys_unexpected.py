"""When keys-unexpected fires, and what it says: its messages are in keys-unexpected.txt."""

from merge_gate.records.files import StoredTensor
from merge_gate.records.terms import Severity
from tests.support.judging.cases import LORA_A, Given, evidence, files, headers
from tests.support.judging.every_check import EveryCheck


class TestKeysUnexpected(EveryCheck):
    FIRES = (
        Given(evidence(unexpected=("optimizer.step",))),
        Given(evidence(unnamed=("model.norm.weight",)), severity=Severity.WARNING),
        Given(files=files(tensors=(StoredTensor(name=LORA_A, dtype="C64", shape=(2, 2)),)), severity=Severity.WARNING),
    )
    SITUATIONS = {
        "a thousand tensors": Given(evidence(unexpected=tuple(f"stray.{number}" for number in range(1000)))),
        "two tensors of the base that the config does not name": Given(evidence(unnamed=("a.weight", "b.weight"))),
        "unexpected, and wrapped twice": Given(
            evidence(unexpected=("a.lora_A", "b.lora_B")),
            files(tensors=headers("base_model.model.base_model.model.q_proj.lora_A.weight")),
        ),
        "unexpected, of layers that were compiled one by one": Given(
            evidence(unexpected=("base_model.model.layers.0._orig_mod.q_proj.lora_A.weight",)),
            files(tensors=headers("base_model.model.layers.0._orig_mod.q_proj.lora_A.weight")),
        ),
        "unexpected, of a model that was merged before": Given(
            evidence(unexpected=("model.embed_tokens.weight",)),
            files(tensors=headers("model.embed_tokens.weight", "model.norm.weight")),
        ),
        "unexpected, and saved twice": Given(evidence(unexpected=("score.modules_to_save.weight",))),
    }
