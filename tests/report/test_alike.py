"""What the findings that are not shown have in common."""

from __future__ import annotations

import dataclasses

import pytest

from merge_gate.judging.bounds import bounded
from merge_gate.records.terms import Finding
from merge_gate.report.wording.alike import more_findings
from tests.support.reports import MERGED_NAN, NAN, OVERFLOW, ROUNDING
from tests.support.wording import Wording


def at(finding: Finding, layer: int | None, module: str) -> Finding:
    name = module if layer is None else f"model.layers.{layer}.{module}"
    return dataclasses.replace(finding, module=name, tensor=f"{name}.weight")


EXPECTED = dataclasses.replace(ROUNDING, module=None, tensor=None, message="expect.r is 16, but the config has 4")
GROUPS: dict[str, list[Finding]] = {
    "none": [],
    "one": [at(NAN, 3, "mlp.up_proj")],
    "ranges": [
        *(at(NAN, layer, "mlp.down_proj") for layer in range(10, 20)),
        at(dataclasses.replace(OVERFLOW, neginf=0), 20, "self_attn.o_proj"),
    ],
    "gaps": [at(NAN, layer, "mlp.down_proj") for layer in (1, 2, 3, 7, 9, 10)],
    "both-infinities": [at(OVERFLOW, 1, "a"), at(OVERFLOW, 2, "b"), at(NAN, None, "lm_head")],
    "many-modules": [at(NAN, 1, f"expert.part{chr(97 + number)}") for number in range(9)],
    "without-values": [at(ROUNDING, 4, "mlp.up_proj"), at(ROUNDING, 5, "mlp.up_proj")],
    "no-place": [EXPECTED, dataclasses.replace(EXPECTED, message="expect.lora_alpha is 8, but the config has 32")],
    "hidden": [at(NAN, None, "a\x1b[31m\u202eb")],
    "counted": list(bounded(at(NAN, layer, "q_proj") for layer in range(150)))[1:],
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_rest_in_a_sentence(name: str, wording: Wording) -> None:
    wording(more_findings(GROUPS[name]) or "(nothing)")


def test_a_forged_count_is_no_count() -> None:
    for more in (float("nan"), float("inf"), -3.0, 1e300):
        forged = dataclasses.replace(MERGED_NAN, message="and many", measured=(("more", more),))
        assert more_findings([forged]).startswith("1 more")
