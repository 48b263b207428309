"""When not-reproducible fires, and what it says: its messages are in not-reproducible.txt."""

from __future__ import annotations

from merge_gate.records.terms import Origin
from tests.support.judging.cases import Fire, evidence, files, spec
from tests.support.judging.every_check import EveryCheck


class TestNotReproducible(EveryCheck):
    FIRES = (
        Fire((), Origin.CONFIG, files=files(config={"peft_type": "ADAMSS"})),
        Fire((), Origin.CONFIG, files=files(config={"peft_type": "FROD"})),
        Fire(("'pissa_niter_4'",), Origin.CONFIG, files=files(config={"init_lora_weights": "pissa_niter_4"})),
    )
    QUIET = (
        (evidence(), files(config={"init_lora_weights": "pissa"}), spec()),
        (evidence(), files(config={"init_lora_weights": True}), spec()),
    )
