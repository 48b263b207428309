"""`merge-gate verify` as a user runs it: whole processes."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.command import merge_gate
from tests.support.hub import LoopbackHub
from tests.support.models import make_adapter
from tests.support.published import flip
from tests.support.verify.accounting import EXPORTS
from tests.support.verify.file_changes import edited
from tests.support.verify.merges import Scene

VARIANT = "bfloat16-base"


def entry(place: Path) -> dict[str, object]:
    report = json.loads((place / "merge-gate-verify" / "report.json").read_text())
    assert report["complete"]
    (found,) = report["adapters"]
    return found


def test_the_merge_passes(scene: Scene, tmp_path: Path) -> None:
    merged, base, adapter = scene.merge(VARIANT), scene.base(VARIANT), scene.adapter(VARIANT)
    answer = merge_gate("verify", merged, "--base", base, "--adapter", adapter, cwd=tmp_path)
    assert answer.code == 0, answer.said
    assert "exact" in answer.out
    found = entry(tmp_path)
    assert (found["verdict"], found["cause"], found["source"]) == ("passed", None, str(merged))
    assert found["compared_with"] == str(adapter)
    assert (found["forward"]["ran"], "verify" in found["forward"]["why_not"]) == (False, True)
    assert answer.out.splitlines()[-1].startswith("Report: ")


@pytest.mark.slow
def test_another_model_fails_unless_its_kind_is_allowed(scene: Scene, tmp_path: Path) -> None:
    words = (scene.merge(VARIANT, times=2), "--base", scene.base(VARIANT), "--adapter", scene.adapter(VARIANT))
    answer = merge_gate("verify", *words, cwd=tmp_path)
    assert answer.code == 1, answer.said
    assert entry(tmp_path)["cause"] == "applied-twice"
    assert {path.name for path in (tmp_path / "merge-gate-verify").iterdir()} >= {"report.html", "junit.xml"}
    allowed = merge_gate("verify", *words, "--allow", "applied-twice", cwd=tmp_path)
    assert allowed.code == 0, allowed.said
    (tmp_path / "broken").mkdir()
    broken = merge_gate("verify", *words[:-1], "broken", cwd=tmp_path)
    assert broken.code == 3, "an adapter that cannot be merged is no answer"


@pytest.mark.slow
@pytest.mark.attempt("R02", "one byte of the weights, by the whole command", "fails")
@pytest.mark.attempt("R03", "truncation in tokenizer.json, by the whole command", "tokenizer-differs")
@pytest.mark.attempt("R04", "a key of config.json, by the whole command", "config-differs")
def test_a_changed_export_fails(tmp_path: Path) -> None:
    """A sample of test_random_changes.py, in the confined worker."""
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    for number, (change, kinds) in enumerate(
        (
            (lambda out: flip(out / "model.safetensors"), {"unexplained", "base-changed", "imprecise", "nonfinite"}),
            (edited("tokenizer.json", truncation=truncation), {"tokenizer-differs"}),
            (edited("config.json", rms_norm_eps=0.5), {"config-differs"}),
        )
    ):
        merged, output = tmp_path / f"m{number}", tmp_path / f"o{number}"
        shutil.copytree(EXPORTS / "mlx", merged)
        change(merged)
        inputs = ("--base", EXPORTS / "base", "--adapter", EXPORTS / "adapter", "-o", output)
        answer = merge_gate("verify", merged, *inputs, cwd=tmp_path)
        assert answer.code == 1, answer.said
        assert json.loads((output / "report.json").read_text())["adapters"][0]["cause"] in kinds, answer.said


@pytest.mark.slow
@pytest.mark.attempt("X01", "a published FEATURE_EXTRACTION adapter on a causal base", "passed")
def test_a_published_body_of_a_causal_base_is_the_merge(scene: Scene, tmp_path: Path) -> None:
    base, adapter = scene.base(VARIANT), tmp_path / "body"
    make_adapter(base, adapter, task_type="FEATURE_EXTRACTION")
    answer = merge_gate("run", adapter, "--base", base, "--publish", "out", cwd=tmp_path)
    assert answer.code == 0, answer.said
    answer = merge_gate("verify", tmp_path / "out" / "body", "--base", base, "--adapter", adapter, cwd=tmp_path)
    assert answer.code == 0, answer.said


@pytest.mark.slow
@pytest.mark.attempt("S12", "a model on the Hub with model.gguf", "unexpected-file")
def test_models_on_the_hub_are_read_by_ranges(scene: Scene, tmp_path: Path) -> None:
    """The finished model, and in the second run its base too: no weight of them is on the disk."""
    merged, base, adapter = scene.merge(VARIANT), scene.base(VARIANT), scene.adapter(VARIANT)
    with LoopbackHub() as hub:
        for name, directory in (
            ("acme/merged", merged),
            ("acme/base", base),
            ("acme/twice", scene.merge(VARIANT, times=2)),
        ):
            hub.add_repo(name, {file.name: file.read_bytes() for file in directory.iterdir()})
        keys = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        right = ("verify", "acme/merged", "--base", str(base), "--adapter", str(adapter))
        answer = merge_gate(*right, cwd=tmp_path, **keys)
        assert answer.code == 0, answer.said
        assert "exact" in answer.out
        wrong = ("verify", "acme/twice", "--base", "acme/base", "--adapter", str(adapter))
        answer = merge_gate(*wrong, cwd=tmp_path, **keys)
        assert answer.code == 1, answer.said
        assert entry(tmp_path)["cause"] == "applied-twice"
        evil = {file.name: file.read_bytes() for file in merged.iterdir()} | {"model.gguf": b"GGUF", "a.png": b"PNG"}
        hub.add_repo("acme/evil", evil)
        answer = merge_gate("verify", "acme/evil", *right[2:], cwd=tmp_path, **keys)
        assert answer.code == 1, answer.said
        assert entry(tmp_path)["cause"] == "unexpected-file"
    assert not [
        path for path in (tmp_path / "cache").rglob("*.safetensors") if "merged" in str(path) or "twice" in str(path)
    ]
