"""When adapter-nonfinite fires, and what it says: its messages are in adapter-nonfinite.txt."""

from __future__ import annotations

from merge_gate.records.measured import FileTensor
from merge_gate.records.terms import Origin, Severity
from tests.support.judging.cases import LORA_B, MODULE, Fire, broken, evidence, files
from tests.support.judging.every_check import EveryCheck


class TestAdapterNonfinite(EveryCheck):
    FIRES = (
        Fire(
            (LORA_B,),
            Origin.ADAPTER,
            evidence(file_tensors=(FileTensor(stats=broken(LORA_B, neginf=2)),)),
            places={"module": MODULE, "tensor": LORA_B, "neginf": 2, "numel": 64},
        ),
        Fire((LORA_B,), Origin.ADAPTER, evidence(file_tensors=(FileTensor(stats=broken(LORA_B, nan=64)),))),
        Fire(
            (LORA_B,),
            Origin.ADAPTER,
            evidence(file_tensors=(FileTensor(stats=broken(LORA_B), used=False),)),
            severity=Severity.WARNING,
        ),
    )
    SITUATIONS = (
        (
            "a tensor of NaN only",
            (evidence(file_tensors=(FileTensor(stats=broken(LORA_B, nan=60, posinf=1, neginf=3)),)), files()),
        ),
    )
