"""What the files alone say: exchanged arguments, other architectures, quantized models, and models that do not load."""

import shutil
from pathlib import Path

import pytest

from merge_gate.cli.dispatch import main
from merge_gate.config.exchanged import refuse_exchanged_base
from merge_gate.features.verify import misplaced
from merge_gate.features.verify.answer import architecture_finding
from merge_gate.files.resolve import resolve_base
from merge_gate.judging.kinds import ALLOWED
from merge_gate.records.report import AdapterReport
from merge_gate.records.terms import FailureKind, Severity, Verdict
from tests.support.models import make_base
from tests.support.verify.file_changes import added, both, edited, removed
from tests.support.verify.merges import Scene, weights_of, write_weights
from tests.support.verify.verification import Verifier

VARIANT = "bfloat16-base"


def reported(merged: Path, scene: Scene, base: Path | None = None) -> AdapterReport:
    return Verifier().report(merged, base or scene.base(VARIANT), scene.adapter(VARIANT), allowed=ALLOWED)


# --- exchanged arguments ---------------------------------------------------------------------------------------------


def test_exchanged_arguments_are_refused_with_a_correction(
    scene: Scene, capsys: pytest.CaptureFixture[str], tmp_path: Path, cwd
) -> None:
    merged, base, adapter = map(str, (scene.merge(VARIANT), scene.base(VARIANT), scene.adapter(VARIANT)))
    right = misplaced.command(merged, base, adapter)
    for words in ((adapter, "--base", base, "--adapter", merged), (merged, "--base", adapter, "--adapter", base)):
        assert main(["verify", *words]) == 2
        told = capsys.readouterr().err
        assert f"run: {right}" in told
        assert "exchanged" in told
    for words in (
        (adapter, "--base", base, "--adapter", adapter),
        (adapter,),
        (merged, "--base", base, "--adapter", base),
        (merged, "--base", adapter, "--adapter", adapter),
        (merged, "--base", base, "--adapter", adapter, "--candidate", base),
    ):
        assert main(["verify", *words]) == 2
        assert "run: merge-gate verify" in capsys.readouterr().err
    assert not (tmp_path / "merge-gate-verify" / "report.json").exists()


@pytest.mark.attempt("M8", "base and adapter exchanged, in run and in check", "exit code 2 with the corrected command")
@pytest.mark.parametrize("command", ["run", "check"])
def test_a_run_with_base_and_adapter_exchanged_is_refused(
    command: str, scene: Scene, capsys: pytest.CaptureFixture[str], tmp_path: Path, cwd
) -> None:
    base, adapter = str(scene.base(VARIANT)), str(scene.adapter(VARIANT))
    assert main([command, base, "--base", adapter]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[-1] == f"  run: merge-gate {command} {adapter} --base {base}"
    refuse_exchanged_base(command, base, [adapter])
    refuse_exchanged_base(command, adapter, [base, adapter])


def test_no_command_is_made_of_names_that_cannot_be_typed() -> None:
    assert misplaced.command("a b", "c", None) == "merge-gate verify 'a b' --base c"
    for name in ("a\nb", "a\u202eb", "a`b"):
        assert not misplaced.command(name, "c", "d")


def test_a_model_and_its_base_exchanged_are_named(scene: Scene) -> None:
    report = reported(scene.base(VARIANT), scene, base=scene.merge(VARIANT))
    found = next(one for one in report.findings if one.check == "other-strength")
    assert "MERGED and --base are exchanged" in found.hint
    assert "merge-gate verify" in found.hint


# --- another architecture --------------------------------------------------------------------------------------------


def wider(out: Path, source: Path) -> None:
    shutil.copytree(source, out)
    edited("config.json", hidden_size=64, intermediate_size=96)(out)
    write_weights(out, {name: one.repeat(*[2] * one.dim()) for name, one in weights_of(source).items()})


def test_a_model_of_another_architecture_or_size_is_named(scene: Scene, tmp_path: Path) -> None:
    make_base("gpt2", tmp_path / "gpt2")
    wider(tmp_path / "wider", scene.merge(VARIANT))
    for name, key in (("gpt2", "model_type"), ("wider", "hidden_size")):
        report = reported(tmp_path / name, scene)
        (found,) = report.findings
        assert (report.verdict, found.check, report.failure) == (
            Verdict.FAILED, "other-architecture", FailureKind.UNEXPECTED,
        )  # fmt: skip
        assert key in found.message


def test_a_changed_config_alone_is_no_other_architecture(scene: Scene, tmp_path: Path) -> None:
    shutil.copytree(scene.merge(VARIANT), tmp_path / "merged")
    edited("config.json", model_type="mistral", num_attention_heads=2)(tmp_path / "merged")
    files = [resolve_base(str(place)).base_files for place in (scene.base(VARIANT), tmp_path / "merged")]
    assert None not in files
    assert architecture_finding(*files) is None  # type: ignore[arg-type]


# --- what cannot be loaded or compared -------------------------------------------------------------------------------


def _quantized(out: Path) -> None:
    from tests.support import bases  # noqa: PLC0415 - imports bitsandbytes

    packed = {}
    for name, one in weights_of(out).items():
        is_linear = "_proj" in name
        packed |= bases.bnb_8bit(name.removesuffix(".weight"), one.float()) if is_linear else {name: one}
    write_weights(out, packed)
    edited("config.json", quantization_config=bases.BNB_8BIT_CONFIG)(out)


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (removed("config.json"), Verdict.FAILED),
        (both(removed("model.safetensors"), added("pytorch_model.bin")), Verdict.ERROR),
        (_quantized, Verdict.ERROR),
    ],
    ids=["no config.json", "a pickle", "quantized"],
)
def test_a_model_that_cannot_be_loaded_is_never_allowed(scene: Scene, tmp_path: Path, change, verdict: Verdict) -> None:
    """Although all kinds are allowed that may be. Its sentences speak of the model."""
    shutil.copytree(scene.merge(VARIANT), tmp_path / "merged")
    change(tmp_path / "merged")
    report = reported(tmp_path / "merged", scene)
    assert report.verdict is verdict
    decided = report.findings[report.decided_by or 0]
    assert decided.severity is Severity.ERROR
    assert "the base" not in decided.message
    assert "model" in decided.message


def test_a_base_that_is_stored_quantized_is_not_compared(scene: Scene, tmp_path: Path) -> None:
    shutil.copytree(scene.base(VARIANT), tmp_path / "base")
    _quantized(tmp_path / "base")
    report = reported(scene.merge(VARIANT), scene, base=tmp_path / "base")
    assert report.verdict is Verdict.ERROR
    assert "stored quantized (bitsandbytes_8bit)" in report.findings[0].message
