"""When activation-nonfinite fires, and what it says: its messages are in activation-nonfinite.txt."""

from typing import Any

from merge_gate.records.measured import Evidence, Forward
from merge_gate.records.terms import Origin, Severity
from tests.support.faults import Case, blow_up, healthy
from tests.support.judging.cases import MODULE, Given, base, broken, evidence, merged
from tests.support.judging.every_check import EveryCheck

LOUDER = blow_up("lm_head.weight", 3.0)


def run(origin: Origin | None, **changes: Any) -> Evidence:
    usual = {"ran": True, "nonfinite_module": MODULE, "nonfinite_origin": origin, "nonfinite_of_base": 24912.0}
    return evidence(forward=Forward(**(usual | changes)))


class TestActivationNonfinite(EveryCheck):
    FAULTS = (Case("products-overflow", "loud-base", break_=LOUDER, cause="activation-nonfinite", origin="adapter"),)
    HEALTHY = (healthy("products-fit", "loud-base", break_=LOUDER, dtype="bfloat16"),)
    FIRES = (
        Given(run(Origin.ADAPTER)),
        Given(run(Origin.ADAPTER, nonfinite_module="")),
        Given(run(Origin.MERGE)),
        Given(run(Origin.ADAPTER, output_error=1.01)),
        Given(run(Origin.MERGE, output_error=1.0), severity=Severity.WARNING),
        Given(run(Origin.BASE, nonfinite_of_base=None), severity=Severity.WARNING),
    )
    QUIET = (
        Given(run(None, nonfinite_module=None)),
        Given(evidence(forward=run(Origin.ADAPTER).forward, merges=(merged(broken()),))),
        Given(evidence(forward=run(Origin.ADAPTER).forward, base=base(nonfinite=(broken("model.norm.weight"),)))),
    )
