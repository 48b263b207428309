"""When base-inconsistent fires, and what it says: its messages are in base-inconsistent.txt."""

from typing import Any

from merge_gate.judging.checks import base_inconsistent
from merge_gate.records.refusals import Refusal
from merge_gate.records.terms import Finding, Origin, Severity
from tests.support.judging.cases import COUNTS, MANY, NAMES, WEIGHT, base, reason, refusing, unworded
from tests.support.judging.every_check import EveryCheck
from tests.support.wording import Wording

NORM = "model.norm.weight"


def left_out(**settings: Any) -> Refusal:
    usual = {"file": "a.safetensors", "names": ("q.SCB",), "wrapped": (), "class_name": "LlamaModel"}
    return reason("stored_tensors_left_out", base="./base", **(usual | settings))


class TestBaseInconsistent(EveryCheck):
    FIRES = (
        refusing(
            reason("base_shape_clash", base="./base", class_name="LlamaModel", name=WEIGHT, got=(2,), expected=(3,))
        ),
    )
    REFUSED = (
        reason("adapter_next_to_base", base="./base"),
        left_out(),
        left_out(file=None, names=("q.SCB", "k.SCB")),
        left_out(wrapped=("q.base_layer.weight",)),
        left_out(names=MANY),
        left_out(wrapped=MANY),
        reason("quantized_weight_torn", base="./base", file="a", tensor=NORM, dtype="int8", missing=("SCB",)),
        reason("quantized_weight_torn", base="./base", file="a", tensor=NORM, dtype="int8", missing=("SCB", "scale")),
        reason("quantized_weight_torn", base="./base", file="a", tensor=NORM, dtype="int8", missing=MANY),
        reason("codes_for_numbers", base="./base", file="a", tensor=NORM, dtype="int8", class_name="LlamaModel"),
        reason("base_shape_clash", base="./base", class_name="LlamaModel", name=NORM, got=(48,), expected=(40,)),
    )


@COUNTS
def test_stored_tensors_that_the_model_lacks_are_a_note(count: int, wording: Wording) -> None:
    (found,) = base_inconsistent.of_base(base(loaded_as="LlamaModel", unloaded=NAMES[:count]))
    wording(found)
    assert unworded(found) == Finding(
        check="base-inconsistent",
        severity=Severity.NOTE,
        origin=Origin.BASE,
        tensor="model.layers.0.mlp.weight",
        message="",
    )
