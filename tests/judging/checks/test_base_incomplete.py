"""When base-incomplete fires, and what it says: its messages are in base-incomplete.txt."""

from merge_gate.judging.checks import base_incomplete
from merge_gate.records.terms import Finding, Origin, Severity
from tests.support.judging.cases import COUNTS, MANY, NAMES, WEIGHT, Given, base, evidence, reason, refusing, unworded
from tests.support.judging.every_check import EveryCheck
from tests.support.wording import Wording

NORM = "model.norm.weight"


class TestBaseIncomplete(EveryCheck):
    FIRES = (
        refusing(reason("parameters_not_stored", base="./base", class_name="LlamaModel", names=(WEIGHT,), read=("a",))),
        Given(
            evidence(
                base=base(loaded_as="LlamaForCausalLM", incomplete=("model.norm.weight", "lm_head.weight")),
                initialized=("model.norm.weight",),
            )
        ),
        Given(
            evidence(base=base(loaded_as="LlamaForCausalLM", incomplete=("lm_head.weight",))), severity=Severity.NOTE
        ),
    )
    REFUSED = (
        reason("parameters_not_stored", base="./base", class_name="LlamaModel", names=(NORM,), read=("a",)),
        reason(
            "parameters_not_stored",
            base="./base",
            class_name="LlamaModel",
            names=(NORM, "b"),
            read=("a",),
            elsewhere=("c",),
        ),
        reason(
            "parameters_not_stored", base="./base", class_name="LlamaModel", names=(NORM,), read=MANY, elsewhere=MANY
        ),
    )


@COUNTS
def test_parameters_that_would_be_random_are_an_error(count: int, wording: Wording) -> None:
    found = base_incomplete.incomplete("./base", NAMES[:count], "LlamaModel")
    wording(found)
    assert unworded(found) == Finding(
        check="base-incomplete",
        severity=Severity.ERROR,
        origin=Origin.BASE,
        module="model.layers.0.mlp",
        tensor="model.layers.0.mlp.weight",
        message="",
    )


@COUNTS
def test_parameters_that_the_adapter_brings_are_a_note(count: int, wording: Wording) -> None:
    found = base_incomplete.brought(base(loaded_as="LlamaModel", incomplete=NAMES[:count]))
    wording(found)
    assert unworded(found) == Finding(
        check="base-incomplete",
        severity=Severity.NOTE,
        origin=Origin.BASE,
        module="model.layers.0.mlp",
        tensor="model.layers.0.mlp.weight",
        message="",
    )


def test_what_is_known_of_the_files_stands_behind_the_names(wording: Wording) -> None:
    wording(base_incomplete.incomplete("./base", NAMES[:1], "LlamaModel", " (looked at: a.safetensors)").message)
