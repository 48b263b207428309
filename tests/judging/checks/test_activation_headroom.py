"""When activation-headroom fires, and what it says: its messages are in activation-headroom.txt."""

from dataclasses import replace
from typing import Any

from merge_gate.records.measured import Evidence, Forward
from tests.support.faults import blow_up, healthy
from tests.support.judging.cases import HALF_MAX, MODULE, Given, base, evidence
from tests.support.judging.every_check import EveryCheck


def reaching(largest: float | None, **changes: Any) -> Evidence:
    """An adapter that raises a module to this value, in a base with a larger one."""
    usual: dict[str, Any] = {"ran": True, "largest": 60_000.0, "largest_module": "lm_head", "largest_of_base": 60_000.0}
    raised = {"raised": largest, "raised_module": MODULE, "raised_of_base": 24912.0, "largest_allowed": HALF_MAX}
    forward = Forward(**(usual | raised))
    return evidence(forward=forward, **changes)


REACHED = reaching(45056.0)


class TestActivationHeadroom(EveryCheck):
    HEALTHY = (
        healthy(
            "products-near-the-limit",
            "loud-base",
            break_=blow_up("lm_head.weight", 1.5),
            warnings=("activation-headroom",),
        ),
    )
    FIRES = (Given(reaching(45056.0)), Given(evidence(forward=replace(REACHED.forward, raised_module=""))))
    QUIET = (
        Given(evidence(forward=replace(REACHED.forward, nonfinite_module=MODULE))),
        Given(reaching(HALF_MAX / 2)),
        Given(reaching(None)),
        Given(reaching(45056.0, base=base(dtype="bfloat16"))),
        Given(evidence(forward=Forward())),
    )
