"""When base-nonfinite fires, and what it says: its messages are in base-nonfinite.txt."""

from merge_gate.judging.checks.base_nonfinite import of_base
from merge_gate.records.terms import Severity
from tests.support.judging.cases import Given, base, broken, evidence, tensor
from tests.support.judging.every_check import EveryCheck


class TestBaseNonfinite(EveryCheck):
    FIRES = (
        Given(evidence(base=base(nonfinite=(broken("model.norm.weight"),)))),
        Given(
            evidence(base=base(nonfinite=(broken("lm_head.weight"),)), replaced_nonfinite=("lm_head.weight",)),
            severity=Severity.WARNING,
        ),
        Given(
            evidence(base=base(nonfinite=(broken("lm_head.weight.absmax"),)), replaced_nonfinite=("lm_head.weight",)),
            severity=Severity.WARNING,
        ),
    )
    SITUATIONS = {
        "an infinite buffer of the base": Given(
            evidence(base=base(nonfinite=(tensor("model.mask", neginf=3, is_buffer=True, first_index=(0, 1)),)))
        ),
        "a NaN in a buffer of the base": Given(
            evidence(base=base(nonfinite=(tensor("model.mask", nan=1, is_buffer=True, first_index=(0, 1)),)))
        ),
    }


def test_a_replaced_tensor_of_the_base_hides_no_other() -> None:
    tensors = tuple(broken(f"{name}.weight") for name in ("lm_head", "model.norm"))
    replaced, other = of_base(base(nonfinite=tensors), ("lm_head.weight",))
    assert (replaced.severity, replaced.tensor) == (Severity.WARNING, "lm_head.weight")
    assert (other.severity, other.tensor) == (Severity.ERROR, "model.norm.weight")
