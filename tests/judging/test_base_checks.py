"""What is wrong with the base itself: how it is said, which tensor is named, and what the adapter makes up for."""

from __future__ import annotations

import dataclasses

import pytest

from merge_gate.judging.adapter_report import base_report
from merge_gate.judging.checks import base_format, base_incomplete, base_inconsistent
from merge_gate.records.config import BaseSpec
from merge_gate.records.files import BaseFiles, DeclaredQuantization
from merge_gate.records.terms import Finding, Origin, Quantization, Severity
from tests.support.judging.cases import base
from tests.support.wording import Wording

NAMES = tuple(f"model.layers.{number}.mlp.weight" for number in range(8))
"""More than any message lists."""

COUNTS = pytest.mark.parametrize("count", [1, 2, len(NAMES)])
"""One, several, and more than a message lists."""


def unworded(finding: Finding | None) -> Finding | None:
    """The finding without its sentences, which are in the golden."""
    return finding and dataclasses.replace(finding, message="", hint="")


# --- parameters without a stored tensor ------------------------------------------------------------------------------


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


# --- the line of a base ----------------------------------------------------------------------------------------------


def test_a_sound_base_has_no_findings() -> None:
    assert [*base_incomplete.of_base(base()), *base_inconsistent.of_base(base())] == []


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


def test_the_line_of_a_base_has_both_and_the_error_first() -> None:
    """An adapter may bring what is missing. The line of the base does not know that, so it has the error."""
    facts = base(loaded_as="LlamaModel", incomplete=NAMES[2:4], unloaded=NAMES[4:6])
    first, second = base_report(facts).findings
    assert first == base_incomplete.incomplete(facts.model, NAMES[2:4], facts.loaded_as)
    assert (second.check, second.severity, second.tensor) == ("base-inconsistent", Severity.NOTE, NAMES[4])


# --- what is asked of the base ---------------------------------------------------------------------------------------

BNB_4BIT = DeclaredQuantization(method="bitsandbytes_4bit", file="config.json", key="quantization_config")
BNB_8BIT = dataclasses.replace(BNB_4BIT, method="bitsandbytes_8bit")
FP8 = dataclasses.replace(BNB_4BIT, method="fp8")


@pytest.mark.parametrize(
    ("declared", "asked"),
    [
        (None, Quantization.NONE),
        (None, Quantization.BNB_4BIT),
        (FP8, Quantization.NONE),
        (BNB_4BIT, Quantization.NONE),
        (BNB_4BIT, Quantization.BNB_4BIT),
        (BNB_8BIT, Quantization.BNB_8BIT),
        (dataclasses.replace(FP8, is_read=False), Quantization.BNB_4BIT),
    ],
)
def test_a_base_that_can_be_loaded_as_it_is_asked_for(
    declared: DeclaredQuantization | None, asked: Quantization
) -> None:
    files = BaseFiles(directory="/base", quantization=declared)
    assert base_format.of_request(BaseSpec(model="/base", quantization=asked), files) is None


@pytest.mark.parametrize(
    ("declared", "asked"),
    [(BNB_4BIT, Quantization.BNB_8BIT), (BNB_8BIT, Quantization.BNB_4BIT), (FP8, Quantization.BNB_4BIT)],
    ids=["4bit-as-8bit", "8bit-as-4bit", "fp8-as-4bit"],
)
def test_a_base_that_is_quantized_otherwise_is_refused(
    declared: DeclaredQuantization, asked: Quantization, wording: Wording
) -> None:
    files = BaseFiles(directory="/base", quantization=declared)
    found = base_format.of_request(BaseSpec(model="/base", label="./base", quantization=asked), files)
    assert found is not None
    wording(found)
    assert unworded(found) == Finding(check="base-format", severity=Severity.ERROR, origin=Origin.BASE, message="")


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (BaseSpec(model="/models/b", label="./b"), '"./b"'),
        (BaseSpec(model="/models/b"), '"/models/b"'),
        (BaseSpec(), '"/cache/b"'),
        (BaseSpec(label="a\nb"), '"a\\nb"'),
        (BaseSpec(label="x" * 200), f'"{"x" * 200}"'),
        (BaseSpec(label="x" * 201), f'"{"x" * 199}…"'),
    ],
    ids=["label", "model", "directory", "hidden", "long", "too-long"],
)
def test_the_base_is_called_as_it_was_asked_for(spec: BaseSpec, name: str) -> None:
    asked = dataclasses.replace(spec, quantization=Quantization.BNB_4BIT)
    found = base_format.of_request(asked, BaseFiles(directory="/cache/b", quantization=FP8))
    assert found is not None
    assert f" {name} " in found.message
