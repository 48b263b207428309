"""When tied-weights fires, and what it says: its messages are in tied-weights.txt."""

from __future__ import annotations

from merge_gate.records.terms import Origin
from tests.support.judging.cases import Fire, evidence, files
from tests.support.judging.every_check import EveryCheck


class TestTiedWeights(EveryCheck):
    FIRES = (
        Fire(
            ("lm_head.weight", "embed_tokens"),
            Origin.CONFIG,
            evidence(tied=(("lm_head.weight", "model.embed_tokens"),)),
            places={"module": "lm_head", "tensor": "lm_head.weight"},
        ),
    )
    SITUATIONS = (("two ties", (evidence(tied=(("lm_head.weight", "embed"), ("a.b.weight", "c"))), files())),)
