"""When merge-differs fires, and what it says: its messages are in merge-differs.txt.

More real adapters that it fails are in tests/engine/merge/test_proof.py and tests/engine/test_custom_forward.py.
"""

from __future__ import annotations

import math

from merge_gate.records.measured import Evidence, FileTensor, LayerDifference
from merge_gate.records.terms import Origin
from tests.support.faults import Case, healthy
from tests.support.judging.cases import LORA_B, MODULE, Fire, broken, evidence, files, judge, merged, spec
from tests.support.judging.every_check import EveryCheck


def different(*layers: tuple[str, float]) -> Evidence:
    return evidence(
        different=tuple(
            LayerDifference(module=module, class_name="StandardizedConv2d", change_share=share, output_share=share)
            for module, share in layers
        )
    )


class TestMergeDiffers(EveryCheck):
    FIRES = (
        Fire(("StandardizedConv2d", "25%"), Origin.MERGE, different((MODULE, 0.25)), places={"module": MODULE}),
        Fire(
            ("a.b", "50%"), Origin.MERGE, different((MODULE, 0.25), ("a.b", 0.5), ("c", 0.1)), places={"module": "a.b"}
        ),
        Fire((), Origin.MERGE, different((MODULE, math.inf)), places={"module": MODULE}),
    )
    SITUATIONS = (
        ("one layer", (different((MODULE, 0.123)), files())),
        ("several layers", (different(*((f"layers.{number}", 1.0 + number) for number in range(9))), files())),
        ("a merged layer that does not run", (different((MODULE, math.inf)), files())),
    )
    FAULTS = (Case("positions", "positions", cause="merge-differs", origin="merge"),)
    HEALTHY = (healthy("next-to-positions"),)


def test_what_the_layer_computes_is_a_cause_before_the_values_that_it_holds() -> None:
    both = different((MODULE, 2.0))
    findings = judge(spec(), files(), evidence(different=both.different, merges=(merged(broken()),)))
    assert [finding.check for finding in findings] == ["merge-differs", "merged-nonfinite"]


def test_the_file_is_a_cause_before_what_the_layer_computes() -> None:
    both = evidence(different=different((MODULE, 2.0)).different, file_tensors=(FileTensor(stats=broken(LORA_B)),))
    assert judge(spec(), files(), both)[0].check == "adapter-nonfinite"
