"""When base-nonfinite fires, and what it says: its messages are in base-nonfinite.txt."""

from __future__ import annotations

from merge_gate.judging.checks.base_nonfinite import of_base
from merge_gate.records.terms import Origin, Severity
from tests.support.judging.cases import Fire, base, broken, evidence, files, tensor
from tests.support.judging.every_check import EveryCheck


class TestBaseNonfinite(EveryCheck):
    FIRES = (
        Fire(
            ("./base", "model.norm.weight"),
            Origin.BASE,
            evidence(base=base(nonfinite=(broken("model.norm.weight"),))),
            places={"module": "model.norm", "tensor": "model.norm.weight", "nan": 1, "first_index": (0, 7)},
        ),
        Fire(
            ("./base", "lm_head.weight"),
            Origin.BASE,
            evidence(base=base(nonfinite=(broken("lm_head.weight"),)), replaced_nonfinite=("lm_head.weight",)),
            severity=Severity.WARNING,
        ),
        Fire(
            ("./base", "lm_head.weight.absmax"),
            Origin.BASE,
            evidence(base=base(nonfinite=(broken("lm_head.weight.absmax"),)), replaced_nonfinite=("lm_head.weight",)),
            severity=Severity.WARNING,
        ),
    )
    SITUATIONS = (
        (
            "an infinite buffer of the base",
            (
                evidence(base=base(nonfinite=(tensor("model.mask", neginf=3, is_buffer=True, first_index=(0, 1)),))),
                files(),
            ),
        ),
        (
            "a NaN in a buffer of the base",
            (
                evidence(base=base(nonfinite=(tensor("model.mask", nan=1, is_buffer=True, first_index=(0, 1)),))),
                files(),
            ),
        ),
    )


def test_the_base_has_findings_of_its_own() -> None:
    (finding,) = of_base(base(model="acme/llama", nonfinite=(broken("model.norm.weight"),)))
    assert (finding.check, finding.origin, finding.tensor) == ("base-nonfinite", Origin.BASE, "model.norm.weight")


def test_a_replaced_tensor_of_the_base_hides_no_other() -> None:
    tensors = tuple(broken(f"{name}.weight") for name in ("lm_head", "model.norm"))
    replaced, other = of_base(base(nonfinite=tensors), ("lm_head.weight",))
    assert (replaced.severity, replaced.tensor) == (Severity.WARNING, "lm_head.weight")
    assert (other.severity, other.tensor) == (Severity.ERROR, "model.norm.weight")
