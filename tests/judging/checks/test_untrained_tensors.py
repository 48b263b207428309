"""When untrained-tensors fires, and what it says: its messages are in untrained-tensors.txt."""

from __future__ import annotations

from merge_gate.records.terms import Origin
from tests.support.judging.cases import Fire, base, evidence
from tests.support.judging.every_check import EveryCheck


class TestUntrainedTensors(EveryCheck):
    FIRES = (
        Fire(
            (),
            Origin.ADAPTER,
            evidence(base=base(loaded_as="BertModel"), initialized=("pooler.dense.bias",)),
            places={"module": "pooler.dense", "tensor": "pooler.dense.bias"},
        ),
        Fire(
            (),
            Origin.ADAPTER,
            evidence(base=base(loaded_as="BertModel"), initialized=("pooler.dense.bias", "pooler.dense.weight")),
        ),
    )
