"""When not-reproducible fires, and what it says: its messages are in not-reproducible.txt."""

from tests.support.judging.cases import Given, files
from tests.support.judging.every_check import EveryCheck


class TestNotReproducible(EveryCheck):
    FIRES = (
        Given(files=files(config={"peft_type": "ADAMSS"})),
        Given(files=files(config={"peft_type": "FROD"})),
        Given(files=files(config={"init_lora_weights": "pissa_niter_4"})),
    )
    QUIET = (
        Given(files=files(config={"init_lora_weights": "pissa"})),
        Given(files=files(config={"init_lora_weights": True})),
    )
