"""When tied-weights fires, and what it says: its messages are in tied-weights.txt."""

from tests.support.judging.cases import Given, evidence
from tests.support.judging.every_check import EveryCheck


class TestTiedWeights(EveryCheck):
    FIRES = (Given(evidence(tied=(("lm_head.weight", "model.embed_tokens"),))),)
    SITUATIONS = {"two ties": Given(evidence(tied=(("lm_head.weight", "embed"), ("a.b.weight", "c"))))}
