"""Each right merge is named right, and each wrong one by what is wrong with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from merge_gate.records.terms import Severity, Verdict
from tests.support.verify.merges import EXACT, RIGHT, WRONG, Recipe, Scene
from tests.support.verify.verification import Verifier

if TYPE_CHECKING:
    from pathlib import Path

    from merge_gate.records.report import AdapterReport

IN_MAKE_TEST = {"all-linear", "dora", "modules-to-save", "resized-vocabulary", "conv1d", "fused-experts", "tied-base"}
"""The variants of `EXACT` that `make test` verifies; the others are slow."""

GOOD = {"exact", "other-order", "rounding"}


def reported(recipe: Recipe, scene: Scene, verifier: Verifier, out: Path, *allowed: str) -> AdapterReport:
    recipe.make(scene, out)
    return verifier.report(
        out, recipe.base_of(scene), recipe.adapter_of(scene), *recipe.candidates(scene), allowed=allowed
    )


def told(report: AdapterReport) -> str:
    return "\n".join(f"{one.severity} {one.check}: {one.message}" for one in report.findings)


def errors(report: AdapterReport) -> list[str]:
    return [one.check for one in report.findings if one.severity is Severity.ERROR]


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(
            recipe,
            marks=[
                pytest.mark.attempt(f"right-{number:02}", f"a right merge: {recipe.name}", recipe.kind),
                *([pytest.mark.slow] if recipe.variant in set(EXACT) - IN_MAKE_TEST - {"float16-base"} else []),
            ],
        )
        for number, recipe in enumerate(RIGHT, 1)
    ],
    ids=str,
)
def test_a_right_merge_is_named(recipe: Recipe, scene: Scene, verifier: Verifier, tmp_path: Path) -> None:
    report = reported(recipe, scene, verifier, tmp_path / "merged")
    assert report.verdict is Verdict.PASSED, told(report)
    assert [one.check for one in report.findings if one.check in GOOD] == [recipe.kind], told(report)


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(
            recipe, marks=pytest.mark.attempt(f"wrong-{number:02}", f"a wrong merge: {recipe.name}", recipe.kind)
        )
        for number, recipe in enumerate(WRONG, 1)
    ],
    ids=str,
)
def test_a_wrong_merge_is_named(recipe: Recipe, scene: Scene, verifier: Verifier, tmp_path: Path) -> None:
    report = reported(recipe, scene, verifier, tmp_path / "merged")
    assert report.verdict is Verdict.FAILED, told(report)
    assert errors(report) == [recipe.kind, *recipe.also], told(report)
    assert report.cause == recipe.kind


def test_a_lost_head_is_named_without_computed_buffers(scene: Scene, verifier: Verifier, tmp_path: Path) -> None:
    recipe = next(one for one in WRONG if one.name == "MTP heads dropped with positions")
    (lost,) = [one for one in reported(recipe, scene, verifier, tmp_path / "m").findings if one.check == "not-carried"]
    assert (lost.tensor, dict(lost.measured)) == ("mtp.x", {"tensors": 1})


def test_there_are_enough_of_both() -> None:
    assert len(RIGHT) >= 25
    assert len({recipe.name for recipe in WRONG}) >= 25
