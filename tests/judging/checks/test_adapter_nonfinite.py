"""When adapter-nonfinite fires, and what it says: its messages are in adapter-nonfinite.txt."""

from merge_gate.records.measured import FileTensor
from merge_gate.records.terms import Severity
from tests.support.judging.cases import LORA_B, Given, broken, evidence
from tests.support.judging.every_check import EveryCheck


class TestAdapterNonfinite(EveryCheck):
    FIRES = (
        Given(evidence(file_tensors=(FileTensor(stats=broken(LORA_B, neginf=2)),))),
        Given(evidence(file_tensors=(FileTensor(stats=broken(LORA_B, nan=64)),))),
        Given(evidence(file_tensors=(FileTensor(stats=broken(LORA_B), used=False),)), severity=Severity.WARNING),
    )
    SITUATIONS = {
        "a tensor of NaN only": Given(
            evidence(file_tensors=(FileTensor(stats=broken(LORA_B, nan=60, posinf=1, neginf=3)),))
        )
    }
