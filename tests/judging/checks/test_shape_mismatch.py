"""When shape-mismatch fires, and what it says: its messages are in shape-mismatch.txt."""

from tests.support.judging.cases import LORA_A, LORA_B, reason, refusing
from tests.support.judging.every_check import EveryCheck

HEAD = "base_model.model.lm_head.modules_to_save.weight"


class TestShapeMismatch(EveryCheck):
    FIRES = (refusing(reason("shape_clash", name=LORA_B, got=(2,), expected=(3,))),)
    REFUSED = (
        reason("shape_clash", name=LORA_A, got=(8, 32), expected=(16, 32)),
        reason("shape_clash", name=LORA_A, got=(8, 32), expected=(16, 64), others=1),
        reason("shape_clash", name=LORA_A, got=(16, 64), expected=(16, 32)),
        reason("shape_clash", name=LORA_A, got=(0,), expected=(16, 64), others=2),
        reason("shape_clash", name=LORA_A, got=(0, 64), expected=(16, 64)),
        reason("shape_clash", name=HEAD, got=(9, 32), expected=(8, 32), trained_whole=True),
        reason("shape_clash", name=LORA_A, got=(2, 32), expected=(3, 32), of_tokens=True),
    )
