"""When headroom fires, and what it says: its messages are in headroom.txt."""

from __future__ import annotations

import math

from merge_gate.records.terms import Origin
from tests.support.faults import healthy, poison
from tests.support.judging.cases import (
    HALF_MAX,
    MODULE,
    WEIGHT,
    Fire,
    base,
    broken,
    evidence,
    files,
    merged,
    spec,
    tensor,
)
from tests.support.judging.every_check import EveryCheck

SECOND = "model.layers.6.mlp"

HALF_WAY = poison("lora_B.bias", 2.5e4)  # twice that, by the scaling, is 0.76 of what float16 holds


class TestHeadroom(EveryCheck):
    HEALTHY = (
        healthy(
            "near-the-limit",
            "lora-bias",
            break_=HALF_WAY,
            dtype="float16",
            warnings=("headroom", "activation-headroom", "delta-norm"),
        ),
    )
    FIRES = (
        Fire(
            (WEIGHT, "60,000", "65,504", "92%"),
            Origin.MERGE,
            evidence(merges=(merged(tensor(maximum=60000.0)),)),
            places={"module": MODULE, "tensor": WEIGHT},
        ),
        Fire(
            (MODULE, "safe_merge=True"),
            Origin.MERGE,
            evidence(refused_by_safe_merge=(MODULE,)),
            places={"module": MODULE},
        ),
    )
    SITUATIONS = (
        (
            "safe_merge refuses two, and one that is broken besides",
            (
                evidence(
                    refused_by_safe_merge=(MODULE, "lm_head", SECOND, f"{SECOND}.up"),
                    merges=(merged(), merged(broken("x.weight"), module=SECOND)),
                ),
                files(),
            ),
        ),
        (
            "safe_merge refuses on a broken base",
            (evidence(refused_by_safe_merge=(MODULE,), base=base(nonfinite=(broken("model.norm.weight"),))), files()),
        ),
    )
    QUIET = (
        (evidence(merges=(merged(tensor(maximum=HALF_MAX / 2)),)), files(), spec()),
        (evidence(merges=(merged(tensor(maximum=6e4), changed=False),)), files(), spec()),
        (evidence(merges=(merged(tensor(maximum=9e9), dtype_max=math.inf),)), files(), spec()),
        (evidence(merges=(merged(broken()),), refused_by_safe_merge=(MODULE,)), files(), spec()),
    )
