"""When not-reproducible fires, and what it says: its messages are in not-reproducible.txt."""

from merge_gate.records.config import Expect
from merge_gate.records.terms import Severity
from tests.support.judging.cases import Given, files, spec
from tests.support.judging.every_check import EveryCheck

VERA = {"peft_type": "VERA", "save_projection": False, "projection_prng_key": 7}


class TestNotReproducible(EveryCheck):
    FIRES = (
        Given(files=files(config={"peft_type": "ADAMSS"})),
        Given(files=files(config={"peft_type": "FROD"})),
        Given(files=files(config={"init_lora_weights": "pissa_niter_4"})),
        Given(files=files(config=VERA), severity=Severity.NOTE),
    )
    QUIET = (
        Given(files=files(config=VERA), spec=spec(expect=Expect(projection_prng_key=7))),
        Given(files=files(config=VERA | {"save_projection": True})),
        Given(files=files(config={"init_lora_weights": "pissa"})),
        Given(files=files(config={"init_lora_weights": True})),
    )
