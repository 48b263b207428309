"""`--allow KIND` allows that kind and nothing else: another fault next to it is still an error."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from merge_gate.cli.dispatch import main
from merge_gate.judging.kinds import ALLOWED
from merge_gate.records.report import AdapterReport
from merge_gate.records.terms import Verdict
from tests.support.models import Tensors, make_adapter, read_tensors, write_tensors
from tests.support.verify.merges import WRONG, Recipe, Scene, on_tensors, peft_merge, weights_of
from tests.support.verify.verification import Verifier, errors

VARIANT = "bfloat16-base"
MERGED, UNTOUCHED = "layers.1.self_attn.q_proj.weight", "model.norm.weight"

ELSEWHERE = {"file-changed", "not-in-format"}
"""Kinds of the comparison with merge-gate.json, which finds no others, and of GGUF files (test_extended_models.py)."""


def recipe_of(kind: str) -> Recipe:
    """The first wrong merge that is of this kind alone."""
    return next(one for one in WRONG if one.kind == kind and set(one.also) <= {kind})


def _in(part: str, tensors: Tensors) -> Tensors:
    """One value of a tensor, changed by more than any rounding."""
    name = next(one for one in tensors if one.endswith(part.removeprefix("model.")))
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[7] += 0.25
    return tensors


FAULTS = "one changed value in a merged tensor, and in another tensor"


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.attempt(f"--allow {kind}", FAULTS, "still an error"))
        for kind in ALLOWED
        if kind not in ELSEWHERE
    ],
)
def test_an_allowed_kind_passes_alone_and_not_with_another_fault(
    kind: str, scene: Scene, verifier: Verifier, tmp_path: Path
) -> None:
    recipe = recipe_of(kind)
    base, adapter, candidates = recipe.base_of(scene), recipe.adapter_of(scene), recipe.candidates(scene)
    for part in ("", MERGED, UNTOUCHED):
        out = tmp_path / (part or "alone")
        recipe.make(scene, out)
        if part:
            on_tensors(partial(_in, part))(out)
        found = verifier.report(out, base, adapter, *candidates, allowed=(kind,))
        is_of_kind = not part or kind == ("unexplained" if part == MERGED else "base-changed")
        assert found.verdict is (Verdict.PASSED if is_of_kind else Verdict.FAILED), (part, errors(found))
        assert bool(errors(found)) is not is_of_kind


def in_projections(change: Callable[[torch.Tensor], torch.Tensor], tensors: Tensors) -> Tensors:
    return {name: change(one.clone()) if "proj" in name else one for name, one in tensors.items()}


def with_nan(one: torch.Tensor) -> torch.Tensor:
    one.view(-1)[3] = torch.nan
    return one


def report_of(
    change: Callable[[Tensors], Tensors],
    scene: Scene,
    verifier: Verifier,
    out: Path,
    *allowed: str,
    variant: str = VARIANT,
) -> AdapterReport:
    peft_merge(scene.base(variant), scene.adapter(variant), out)
    on_tensors(change)(out)
    return verifier.report(out, scene.base(variant), scene.adapter(variant), allowed=allowed)


@pytest.mark.attempt("V11", "noise in every merged tensor, with one NaN each, under --allow nonfinite", "unexplained")
def test_the_finite_values_of_a_tensor_with_nan_are_compared(scene: Scene, verifier: Verifier, tmp_path: Path) -> None:
    noise = partial(in_projections, lambda one: with_nan(torch.randn_like(one)))
    found = report_of(noise, scene, verifier, tmp_path / "m", "nonfinite")
    assert found.cause in {"unexplained", "wrong-base"}
    assert "nonfinite" not in errors(found)


@pytest.mark.attempt("V13", "a base with one NaN in each merged tensor, under --allow nonfinite", "not-applied")
def test_a_base_with_nan_is_still_the_base(scene: Scene, verifier: Verifier, tmp_path: Path) -> None:
    base = in_projections(with_nan, weights_of(scene.base(VARIANT)))
    found = report_of(lambda _: base, scene, verifier, tmp_path / "m", "nonfinite")
    assert found.cause in {"not-applied", "applied-in-part"}


@pytest.mark.attempt("V12", "an untied head of random values under --allow tied", "base-changed")
@pytest.mark.parametrize("name", ["a head untied", "a head tied", "a head tied to a merged embedding"])
def test_a_head_that_is_tied_otherwise_is_compared(name: str, scene: Scene, verifier: Verifier, tmp_path: Path) -> None:
    recipe = next(one for one in WRONG if one.name == name)
    recipe.make(scene, tmp_path / "m")
    found = verifier.report(tmp_path / "m", recipe.base_of(scene), recipe.adapter_of(scene), allowed=("tied",))
    assert set(errors(found)) == {"base-changed"}


@pytest.mark.attempt("V15", "noise everywhere under --allow wrong-base", "exit code 2")
@pytest.mark.parametrize("kind", ["wrong-base", "broken-files", "other-architecture", "exact"])
def test_a_kind_that_leaves_nothing_to_compare_cannot_be_allowed(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["verify", ".", "--adapter", "x/y", "--allow", kind])
    assert "--allow" in capsys.readouterr().err


@pytest.mark.attempt("V15a", "noise in every tensor, with every kind allowed", "wrong-base")
def test_noise_everywhere_is_no_merge_whatever_is_allowed(scene: Scene, verifier: Verifier, tmp_path: Path) -> None:
    def noise(tensors: Tensors) -> Tensors:
        return {name: torch.randn_like(one) for name, one in tensors.items()}

    found = report_of(noise, scene, verifier, tmp_path / "m", *ALLOWED, "wrong-base")
    assert found.cause == "wrong-base"


# --- rounding --------------------------------------------------------------------------------------------------------


def _up(row: int | slice = slice(None)) -> Callable[[Tensors], Tensors]:
    """One unit of the last place more, in every value of the merged tensors, or in a row."""

    def raised(one: torch.Tensor) -> torch.Tensor:
        one[row] = torch.nextafter(one, torch.full_like(one, torch.inf))[row]
        return one

    return partial(in_projections, raised)


@pytest.mark.attempt("V03", "+1 unit of the last place in every merged value", "unexplained")
def test_a_unit_more_in_every_value_is_unexplained(scene: Scene, verifier: Verifier, tmp_path: Path) -> None:
    for allowed in ((), ("imprecise",)):
        found = report_of(_up(), scene, verifier, tmp_path / f"m{len(allowed)}", *allowed)
        assert found.cause == "unexplained"


@pytest.mark.attempt("V04", "+1 unit of the last place in every value of a row", "unexplained or imprecise")
@pytest.mark.parametrize("variant", [VARIANT, "float16-base", "plain"])
def test_a_unit_more_in_a_row_fails(variant: str, scene: Scene, verifier: Verifier, tmp_path: Path) -> None:
    found = report_of(_up(2), scene, verifier, tmp_path / "m", variant=variant)
    assert found.cause in {"unexplained", "imprecise"}


def test_a_tensor_that_the_merge_does_not_move_is_compared(scene: Scene, verifier: Verifier, tmp_path: Path) -> None:
    """The delta is lost in rounding, so no multiple of it can be found."""
    adapter = tmp_path / "tiny"
    make_adapter(scene.base(VARIANT), adapter)
    write_tensors(adapter, {name: one * 1e-4 for name, one in read_tensors(adapter).items()})
    peft_merge(scene.base(VARIANT), adapter, tmp_path / "m")
    assert errors(verifier.report(tmp_path / "m", scene.base(VARIANT), adapter)) == ["no-effect"]
    on_tensors(_up(2))(tmp_path / "m")
    assert set(errors(verifier.report(tmp_path / "m", scene.base(VARIANT), adapter))) > {"no-effect"}
