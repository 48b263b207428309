"""Each right merge is named right, and each wrong one by what is wrong with it, and no random change is green."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from merge_gate.records.report import AdapterReport
from merge_gate.records.terms import Severity, Verdict
from tests.support import methods
from tests.support.engine import architectures
from tests.support.verify.accounting import EXPORTS
from tests.support.verify.merges import EXACT, RIGHT, WRONG, Recipe, Scene, weights_of, write_weights
from tests.support.verify.random_changes import Place, failures, places
from tests.support.verify.verification import Verifier, errors, told

IN_MAKE_TEST = {"all-linear", "dora", "modules-to-save", "resized-vocabulary", "conv1d", "fused-experts", "tied-base"}
"""The variants of `EXACT` that `make test` verifies; the others are slow."""

GOOD = {"exact", "other-order", "rounding"}


def reported(recipe: Recipe, scene: Scene, verifier: Verifier, out: Path, *allowed: str) -> AdapterReport:
    recipe.make(scene, out)
    return verifier.report(
        out, recipe.base_of(scene), recipe.adapter_of(scene), *recipe.candidates(scene), allowed=allowed
    )


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


# --- merges that other exporters made --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exporter", "kind"),
    [
        pytest.param("mergekit", "other-order", marks=pytest.mark.attempt("V00", "a merge by mergekit", "other-order")),
        pytest.param("mlx", "exact", marks=pytest.mark.attempt("V01", "a merge by mlx-lm", "exact")),
    ],
)
def test_a_merge_by_another_exporter_is_named(exporter: str, kind: str, verifier: Verifier) -> None:
    """exports/exports.json has their versions and dates."""
    report = verifier.report(EXPORTS / exporter, EXPORTS / "base", EXPORTS / "adapter")
    assert report.verdict is Verdict.PASSED, told(report)
    assert [one.check for one in report.findings if one.severity is Severity.NOTE] == [kind], told(report)


# --- random changes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> list[Place]:
    return places(tmp_path_factory.mktemp("changes"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # transformers warns of settings that it does not know
@pytest.mark.attempt("R01", "200 random changes of a key, a byte, or a file", "named, or expected by a row")
@pytest.mark.parametrize("number", range(3))
def test_no_random_change_is_green_unless_a_rule_names_it(number: int, changed: list[Place]) -> None:
    assert list(failures(changed[number], range(number * 67, (number + 1) * 67))) == []


# --- a model whose files have other names than the model --------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter, and PEFT's merge, also with the names that a script saves which dumps the state dict."""
    root = tmp_path_factory.mktemp("qwen")
    architecture = architectures.build("qwen2_5_vl", root / "base")
    architectures.save_lora(architecture, root / "base", root / "adapter")
    with methods.quiet():
        model = PeftModel.from_pretrained(architectures.load(architecture, root / "base"), root / "adapter")
        model.merge_and_unload(safe_merge=True).save_pretrained(root / "merged")
        shutil.copytree(root / "merged", root / "renamed")
        write_weights(root / "renamed", architectures.load(architecture, root / "merged").state_dict())
    return root


def reported_of(verifier: Verifier, qwen: Path, merged: Path, *allowed: str) -> AdapterReport:
    return verifier.report(merged, qwen / "base", qwen / "adapter", allowed=allowed)


def test_the_merge_is_named(verifier: Verifier, qwen: Path) -> None:
    report = reported_of(verifier, qwen, qwen / "merged")
    assert report.verdict is Verdict.PASSED, report.findings
    assert [one.check for one in report.findings if one.severity is Severity.NOTE][-1] == "exact"


def test_other_names_are_named_and_nothing_else(verifier: Verifier, qwen: Path) -> None:
    names, others = (weights_of(qwen / part).keys() for part in ("merged", "renamed"))
    assert len(names & others) <= 1, "the names differ nearly everywhere"
    report = reported_of(verifier, qwen, qwen / "renamed")
    assert errors(report) == ["renamed"]
    assert dict(report.findings[0].measured)["tensors"] == len(others - names)
    assert reported_of(verifier, qwen, qwen / "renamed", "renamed").verdict is Verdict.PASSED


@pytest.mark.parametrize(("source", "part"), [("merged", "visual.blocks.1."), ("renamed", "model.visual.blocks.1.")])
def test_a_lost_tower_is_named(source: str, part: str, verifier: Verifier, qwen: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen / source, tmp_path / "lost")
    tensors = weights_of(qwen / source)
    kept = {name: one for name, one in tensors.items() if not name.startswith(part)}
    assert len(kept) < len(tensors)
    write_weights(tmp_path / "lost", kept)
    assert errors(reported_of(verifier, qwen, tmp_path / "lost", "renamed")) == ["not-carried"]


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint16])
def test_a_model_of_integers_is_not_called_the_base(dtype: torch.dtype, verifier: Verifier, tmp_path: Path) -> None:
    shutil.copytree(EXPORTS / "mlx", tmp_path / "m")
    (weights,) = (tmp_path / "m").glob("*.safetensors")
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    save_file(tensors | {name: tensors[name].to(torch.int32).to(dtype)}, weights)
    report = verifier.report(tmp_path / "m", EXPORTS / "base", EXPORTS / "adapter")
    first = report.findings[0]
    assert (report.verdict, report.cause, first.tensor) == (Verdict.FAILED, "broken-files", name), told(report)
    assert first.message.startswith(f"the model cannot be loaded as it is stored: its weight '{name}'")
    assert "base" not in first.message
    assert first.hint.startswith("save the weight in its real dtype")
