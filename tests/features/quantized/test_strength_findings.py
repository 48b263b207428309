"""The kind of a release follows from the strengths of its tensors and their errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from merge_gate.features.quantized.measurement import Measurement, Setting, TensorStrength
from merge_gate.features.quantized.strength_findings import strength_findings
from merge_gate.records.files import AdapterConfig
from merge_gate.records.terms import Finding

NOISE, DELTA, WEIGHT = 8.0, 2.0, 100.0


def tensor(number: int, strength: float, error: float = 0.01, **more: Any) -> TensorStrength:
    facts = TensorStrength(
        name=f"layers.{number}.q_proj.weight",
        kind="Q4_0",
        touched=True,
        shape=(64, 64),
        expected_shape=(64, 64),
        numel=4096,
        strength=strength,
        error=error,
        weight=WEIGHT,
        delta=DELTA,
        noise=NOISE,
        distance=NOISE,
    )
    return replace(facts, **more)


def untouched(number: int, distance: float = NOISE, **more: Any) -> TensorStrength:
    facts = tensor(number, 0.0, name=f"layers.{number}.o_proj.weight", touched=False, delta=0.0, noise=0.0)
    return replace(facts, noise=distance, distance=distance, **more)


def release(strengths: Sequence[float], error: float = 0.01, **more: Any) -> Measurement:
    tensors = (tensor(number, strength, error, **more) for number, strength in enumerate(strengths))
    return Measurement(format="GGUF (Q4_0)", tensors=(*tensors, untouched(0), untouched(1)))


def small(number: int, strength: float, part: str, error: float = 0.1) -> TensorStrength:
    """A tensor whose delta is small next to its noise, so that alone it may be near to both 1 and 0.75."""
    return tensor(number, strength, error, name=f"layers.{number}.mlp.{part}.weight")


def mixed(strengths: Sequence[float], parts: Sequence[str] = ("up_proj", "down_proj")) -> Measurement:
    """A release whose attention is well measured, and whose other modules are not."""
    rest = (small(number, strength, part) for part in parts for number, strength in enumerate(strengths))
    return replace(release(RIGHT), tensors=(*release(RIGHT).tensors, *rest))


def findings(measurement: Measurement, **candidates: Measurement) -> list[Finding]:
    config = AdapterConfig(r=16, lora_alpha=64)
    made = strength_findings(measurement, candidates, adapter="support", config=config)
    return [one for one in made if one.check != "strength"]


RIGHT = [1.0, 0.99, 1.01, 1.02]
FAR = {"distance": 20.0}


@pytest.mark.parametrize(
    ("measurement", "expected"),
    [
        (release(RIGHT), "applied"),
        (release([1.2, 0.7, 1.1, 1.0], error=0.2), "applied"),
        (release([1.2, 0.7, 1.1, 1.0], error=0.6), "not-measurable"),
        (release([0.4, 0.5, 0.6, 0.5], error=0.4), "not-measurable"),
        (release(RIGHT, error=float("inf")), "not-measurable"),
        (release([1.0, 1.0, 1.0, 0.9]), "other-strength"),
        (release([0.0, 0.01, -0.01, 0.0]), "not-applied"),
        (release([0.0, 0.0, 0.0, 0.0], changed=0.0, is_erased=False), "not-applied"),
        (release([0.05, 0.04, 0.06, 0.02], changed=0.8, is_erased=True), "erased"),
        (release([0.8, 0.7, 0.9, 0.8], changed=0.8, is_erased=True), "erased"),
        (release([0.5, 0.5, 0.5, 0.5], changed=0.8, is_erased=False), "other-strength"),
        (release([0.4, 0.5, 0.4, 0.5], bend=9.0), "erased"),
        (release([2.0, 2.01, 1.99, 2.02]), "applied-twice"),
        (release([-1.0, -1.0, -1.01, -0.99]), "other-strength"),
        (release([1.0, 1.0, 0.0, 0.01]), "applied-in-part"),
        (release([1.0, 1.0, 2.0, 2.0]), "applied-twice"),
        (Measurement(tensors=(tensor(9, 1.0), *(tensor(n, 0.1, 0.4) for n in range(9)))), "applied-in-part"),
        (release([0.0, 0.01, 0.0, 0.0], noise=30.0, own_noise=8.0), "unexplained"),
        (Measurement(tensors=(*release(RIGHT).tensors[:4], untouched(0, 40), untouched(1, 40))), "wrong-base"),
        (Measurement(tensors=(*release(RIGHT).tensors, untouched(2), untouched(3, 40))), "base-changed"),
        (Measurement(tensors=(*release(RIGHT).tensors[:4], untouched(0, 40, own_noise=30.0))), "applied"),
        (Measurement(tensors=(*release(RIGHT).tensors[:4], untouched(0, 2, kind="", own_noise=0.4))), "wrong-base"),
        (Measurement(tensors=(*release(RIGHT).tensors[:4], untouched(0, 0.5, kind="", own_noise=0.4))), "applied"),
        (Measurement(tensors=release(RIGHT, noise=30.0, own_noise=8.0).tensors[:4]), "wrong-base"),
        (Measurement(tensors=(untouched(0),)), "not-measurable"),
        (Measurement(tensors=(*release(RIGHT).tensors[:4], untouched(0, 140, rotated=True))), "not-judged"),
    ],
)
def test_the_strengths_give_the_kind(measurement: Measurement, expected: str) -> None:
    kinds = [one.check for one in findings(measurement)]
    assert kinds[0] == expected or (expected == "base-changed" and expected in kinds), kinds


def test_a_sample_is_said() -> None:
    (one,) = findings(release(RIGHT, sampled=0.25))
    assert one.message.endswith(" times its size. Its errors rest on 25% of the values")


@pytest.mark.parametrize(
    ("strengths", "expected"),
    [
        ([1.05, 0.9, 1.1, 0.95] * 4, "applied"),
        ([0.75, 0.7, 0.85, 0.8] * 4, "other-strength"),
        ([1.25, 1.3, 1.2, 1.2] * 4, "other-strength"),
        ([0.05, 0.1, -0.1, 0.02] * 4, "applied-in-part"),
    ],
)
def test_the_strengths_of_a_kind_are_pooled(strengths: list[float], expected: str) -> None:
    assert [one.check for one in findings(mixed(strengths))] == [expected]


def test_a_kind_at_another_strength_is_named_with_its_strength_and_error() -> None:
    (one,) = findings(mixed([0.75, 0.7, 0.85, 0.8] * 4))
    assert one.message == 'the delta is in 32 tensors of the kind "mlp" 0.77 ± 0.02 times, expected once'
    (one,) = findings(mixed([0.72, 0.7, 0.74, 0.76] * 5, parts=["down_proj"]))
    assert '20 tensors of the kind "down_proj" 0.73 ± 0.03 times' in one.message


def test_the_strength_of_a_kind_is_compared_with_that_of_the_repeated_quantization() -> None:
    right = mixed([0.82] * 16)
    lossy = replace(
        right, tensors=tuple(replace(one, own_strength=0.82) if "mlp" in one.name else one for one in right.tensors)
    )
    assert [one.check for one in findings(right)] == ["other-strength"]
    assert [one.check for one in findings(lossy)] == ["applied"]


def test_an_applied_release_is_described_in_one_line() -> None:
    (one,) = findings(release(RIGHT))
    assert one.message == (
        "support is in this release at 1.00 ± 0.01 of its strength; the noise of GGUF (Q4_0) is 4 times its size"
    )
    assert dict(one.measured).keys() == {"factor", "error", "noise"}


def test_each_tensor_has_a_note_and_the_furthest_is_first() -> None:
    made = strength_findings(release([1.0, 1.0, 0.5]), {}, adapter="support", config=AdapterConfig())
    notes = [one for one in made if one.check == "strength"]
    assert [one.tensor for one in notes][:1] == ["layers.2.q_proj.weight"]
    assert len(notes) == 3
    assert notes[0].message == "the delta is in it 0.50 ± 0.01 times; the noise is 4 times its size"


@pytest.mark.parametrize(("delta", "is_unsure"), [(DELTA, True), (2 * NOISE, False)])
def test_noise_that_may_hide_another_adapter_is_said(delta: float, is_unsure: bool) -> None:
    (one,) = findings(release([0.0, 0.01, -0.01, 0.0], delta=delta))
    assert (one.check, one.hint.endswith("name others with --candidate")) == ("not-applied", is_unsure)


def test_scalings_that_fit_a_factor_are_named() -> None:
    (one,) = findings(release([0.25, 0.25, 0.25, 0.25]))
    assert (one.check, "no scaling at all" in one.message) == ("other-strength", True)


def test_the_layers_without_the_delta_are_named() -> None:
    (one,) = findings(release([1.0, 0.0, 1.0, 1.0]))
    assert "layers.1.q_proj.weight" in one.message
    assert "layers.0" not in one.message


@pytest.mark.parametrize(
    ("own", "noise", "candidate", "expected"),
    [
        ([0.1, 0.1, 0.0, 0.1], NOISE, RIGHT, "other-candidate"),
        (RIGHT, NOISE * 1.1, RIGHT, "other-candidate"),
        (RIGHT, NOISE, RIGHT, "applied"),
        ([0.0, 0.0, 0.0, 0.0], NOISE, [0.0, 0.0, 0.0, 0.0], "not-applied"),
    ],
)
def test_a_candidate_that_fits_is_named(own: list[float], noise: float, candidate: list[float], expected: str) -> None:
    assert [one.check for one in findings(release(own, noise=noise), earlier=release(candidate))] == [expected]


def test_what_cannot_be_compared_is_said_first() -> None:
    tensors = (*release(RIGHT).tensors, tensor(9, 0.0, nonfinite=3), tensor(8, 1.0, shape=(60, 64)))
    settings = (Setting(name="llama.block_count", actual="3", expected="2"),)
    measurement = Measurement(tensors=tensors, absent=("lm_head.weight",), added=("a.bias",), settings=settings)
    kinds = [one.check for one in findings(measurement)]
    assert kinds == ["not-carried", "added", "config-differs", "nonfinite", "shape-changed", "applied"]
