"""When merge-differs fires, and what it says: its messages are in merge-differs.txt.

More real adapters that it fails are in tests/engine/merge/test_proof.py and tests/engine/test_custom_forward.py.
"""

import math

from merge_gate.records.measured import Evidence, FileTensor, LayerDifference, TensorDifference
from tests.support.faults import Case, healthy
from tests.support.judging.cases import LORA_B, MODULE, Given, broken, evidence, files, judge, merged, reason, spec
from tests.support.judging.every_check import EveryCheck


def different(*layers: tuple[str, float]) -> Evidence:
    return evidence(
        different=tuple(
            LayerDifference(module=module, class_name="StandardizedConv2d", change_share=share, output_share=share)
            for module, share in layers
        )
    )


TENSOR = f"{MODULE}.weight"


def wrong(*tensors: TensorDifference) -> Evidence:
    return evidence(wrong=tensors, versions="torch 2.13.0, PEFT 0.21.2")


IN = TensorDifference(tensor=TENSOR, fault="in", values=256, factor=-1.0)


class TestMergeDiffers(EveryCheck):
    FIRES = (
        Given(different((MODULE, 0.25))),
        Given(different((MODULE, 0.25), ("a.b", 0.5), ("c", 0.1))),
        Given(different((MODULE, math.inf))),
        Given(wrong(IN)),
        Given(wrong(TensorDifference(tensor=MODULE, fault="not merged"))),
    )
    SITUATIONS = {
        "one layer": Given(different((MODULE, 0.123))),
        "several layers": Given(different(*((f"layers.{number}", 1.0 + number) for number in range(9)))),
        **{
            f"a tensor: {fault}": Given(wrong(TensorDifference(tensor="a.weight", fault=fault), IN))
            for fault in ("load", "before", "after", "packed")
        },
        **{
            f"the adapter's {fault}": Given(wrong(TensorDifference(tensor=MODULE, fault=fault)))
            for fault in ("factors", "settings")
        },
        "PEFT merges other bits, and is right": Given(
            evidence(differing=(MODULE,), versions="torch 2.13.0, PEFT 0.21.2")
        ),
        "a merged layer that does not run": Given(different((MODULE, math.inf))),
    }
    REFUSED = (
        reason("base_written", tensor=TENSOR, operation="mul_", step="load"),
        reason("place_changed", tensor=TENSOR, step="injection"),
        reason("factors_displaced", module=MODULE, joined=24),
        reason("factors_displaced", module=MODULE, joined=0),
        reason("combined_wrongly", module=MODULE, method="cat", share=0.7),
        reason("combined_wrongly", module=MODULE, method="linear", share=2.0),
    )
    FAULTS = (Case("positions", "positions", cause="merge-differs", origin="merge"),)
    HEALTHY = (healthy("next-to-positions"),)


def test_what_the_layer_computes_is_a_cause_before_its_values() -> None:
    both = different((MODULE, 2.0))
    findings = judge(spec(), files(), evidence(different=both.different, merges=(merged(broken()),)))
    assert [finding.check for finding in findings] == ["merge-differs", "merged-nonfinite"]


def test_the_file_is_a_cause_before_what_the_layer_computes() -> None:
    both = evidence(different=different((MODULE, 2.0)).different, file_tensors=(FileTensor(stats=broken(LORA_B)),))
    assert judge(spec(), files(), both)[0].check == "adapter-nonfinite"
