"""When base-format fires, and what it says: its messages are in base-format.txt."""

import dataclasses

import pytest

from merge_gate.judging.checks import base_format
from merge_gate.records.config import BaseSpec
from merge_gate.records.files import BaseFiles, DeclaredQuantization
from merge_gate.records.refusals import Refusal
from merge_gate.records.terms import Finding, Origin, Quantization, Severity
from tests.support.judging.cases import reason, refusing, unworded
from tests.support.judging.every_check import EveryCheck

BNB_4BIT = DeclaredQuantization(method="bitsandbytes_4bit", file="config.json", key="quantization_config")
BNB_8BIT = dataclasses.replace(BNB_4BIT, method="bitsandbytes_8bit")
FP8 = dataclasses.replace(BNB_4BIT, method="fp8")


def loaded(**settings: str) -> Refusal:
    as_asked = {"quantization": "none", "asked_quantization": "none", "dtype": "float16", "asked_dtype": "auto"}
    return reason("loaded_otherwise", base="./base", class_name="LlamaModel", **(as_asked | settings))


class TestBaseFormat(EveryCheck):
    FIRES = (refusing(reason("quantization_unknown", base="./base", method="odd", transformers="5.0")),)
    REFUSED = (
        reason("quantization_unknown", base="./base", method="odd", transformers="9.0.0"),
        loaded(asked_quantization=Quantization.BNB_8BIT),
        loaded(quantization="fp8", asked_dtype="float32"),
        loaded(asked_dtype="float32"),
    )


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
def test_a_base_that_can_be_loaded_as_it_is_asked_for(declared, asked) -> None:
    files = BaseFiles(directory="/base", quantization=declared)
    assert base_format.of_request(BaseSpec(model="/base", quantization=asked), files) is None


@pytest.mark.parametrize(
    ("declared", "asked"),
    [(BNB_4BIT, Quantization.BNB_8BIT), (BNB_8BIT, Quantization.BNB_4BIT), (FP8, Quantization.BNB_4BIT)],
    ids=["4bit-as-8bit", "8bit-as-4bit", "fp8-as-4bit"],
)
def test_a_base_that_is_quantized_otherwise_is_refused(declared, asked, wording) -> None:
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
    assert f" {name} " in found.message
