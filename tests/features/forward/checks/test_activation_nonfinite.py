"""When activation-nonfinite fires, and what it says: its messages are in activation-nonfinite.txt."""

from __future__ import annotations

from typing import Any

from merge_gate.records.measured import Evidence, Forward
from merge_gate.records.terms import Origin, Severity
from tests.support.faults import Case, blow_up, healthy
from tests.support.judging.cases import MODULE, Fire, base, broken, evidence, files, merged, spec
from tests.support.judging.every_check import EveryCheck

LOUDER = blow_up("lm_head.weight", 3.0)


def run(origin: Origin | None, **changes: Any) -> Evidence:
    usual = {"ran": True, "nonfinite_module": MODULE, "nonfinite_origin": origin, "nonfinite_of_base": 24912.0}
    return evidence(forward=Forward(**(usual | changes)))


class TestActivationNonfinite(EveryCheck):
    FAULTS = (
        Case(
            "products-overflow",
            "loud-base",
            break_=LOUDER,
            cause="activation-nonfinite",
            origin="adapter",
        ),
    )
    HEALTHY = (healthy("products-fit", "loud-base", break_=LOUDER, dtype="bfloat16"),)
    FIRES = (
        Fire((MODULE, "float16", "24,912"), Origin.ADAPTER, run(Origin.ADAPTER), places={"module": MODULE}),
        Fire(("the model itself returns", "24,912"), Origin.ADAPTER, run(Origin.ADAPTER, nonfinite_module="")),
        Fire((MODULE, "merged model", "24,912"), Origin.MERGE, run(Origin.MERGE), places={"module": MODULE}),
        Fire((MODULE, "float16"), Origin.ADAPTER, run(Origin.ADAPTER, output_error=1.01), places={"module": MODULE}),
        Fire(
            (MODULE, "clamps"),
            Origin.MERGE,
            run(Origin.MERGE, output_error=1.0),
            places={"module": MODULE},
            severity=Severity.WARNING,
        ),
        Fire(
            (MODULE, "without any adapter"),
            Origin.BASE,
            run(Origin.BASE, nonfinite_of_base=None),
            places={"module": MODULE},
            severity=Severity.WARNING,
        ),
    )
    QUIET = (
        (run(None, nonfinite_module=None), files(), spec()),
        (evidence(forward=run(Origin.ADAPTER).forward, merges=(merged(broken()),)), files(), spec()),
        (
            evidence(forward=run(Origin.ADAPTER).forward, base=base(nonfinite=(broken("model.norm.weight"),))),
            files(),
            spec(),
        ),
    )
