"""When headroom fires, and what it says: its messages are in headroom.txt."""

import math

from tests.support.faults import healthy, poison
from tests.support.judging.cases import HALF_MAX, MODULE, Given, base, broken, evidence, merged, tensor
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
        Given(evidence(merges=(merged(tensor(maximum=60000.0)),))),
        Given(evidence(refused_by_safe_merge=(MODULE,))),
    )
    SITUATIONS = {
        "safe_merge refuses two, and one that is broken besides": Given(
            evidence(
                refused_by_safe_merge=(MODULE, "lm_head", SECOND, f"{SECOND}.up"),
                merges=(merged(), merged(broken("x.weight"), module=SECOND)),
            )
        ),
        "safe_merge refuses on a broken base": Given(
            evidence(refused_by_safe_merge=(MODULE,), base=base(nonfinite=(broken("model.norm.weight"),)))
        ),
    }
    QUIET = (
        Given(evidence(merges=(merged(tensor(maximum=HALF_MAX / 2)),))),
        Given(evidence(merges=(merged(tensor(maximum=6e4), changed=False),))),
        Given(evidence(merges=(merged(tensor(maximum=9e9), dtype_max=math.inf),))),
        Given(evidence(merges=(merged(broken()),), refused_by_safe_merge=(MODULE,))),
    )
