"""When untrained-tensors fires, and what it says: its messages are in untrained-tensors.txt."""

from tests.support.judging.cases import Given, base, evidence
from tests.support.judging.every_check import EveryCheck


class TestUntrainedTensors(EveryCheck):
    FIRES = (
        Given(evidence(base=base(loaded_as="BertModel"), initialized=("pooler.dense.bias",))),
        Given(evidence(base=base(loaded_as="BertModel"), initialized=("pooler.dense.bias", "pooler.dense.weight"))),
    )
