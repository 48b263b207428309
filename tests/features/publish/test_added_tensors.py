"""Merges with tensors that the base's files lack: PEFT unties an embedding and a head, and classifiers bring a head.

`run --publish` writes what PEFT saves, and `verify` accepts both.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel

from merge_gate.records.terms import Verdict
from tests.support import methods
from tests.support.command import merge_gate
from tests.support.models import Shelf, load_for_training, read_tensors, save_adapter
from tests.support.verify.verification import Verifier

WEIGHTS = "model.safetensors"
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "embedding": ("llama-tied", {"modules_to_save": ["embed_tokens"]}),
    "head": ("llama-tied", {"modules_to_save": ["lm_head"]}),
    "both": ("llama-tied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "more-rows": ("llama-tied", {"modules_to_save": ["embed_tokens"]}),
    "classifier": ("llama-bfloat16", {"task_type": "SEQ_CLS"}),
}
LABELS = 3
ROWS = 70


@pytest.fixture(scope="module")
def place(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`adapters/`, what the gate publishes of them in `merged/`, and what PEFT saves of them in `saved/`."""
    place = tmp_path_factory.mktemp("added")
    adapters = []
    for name, (key, lora) in ADAPTERS.items():
        base, adapter, task = shelf.base(key), place / "adapters" / name, lora.get("task_type", "CAUSAL_LM")
        settings: dict[str, Any] = {"num_labels": LABELS} if task == "SEQ_CLS" else {}
        config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": task} | lora)
        rows = ROWS if name == "more-rows" else None
        save_adapter(base, adapter, config, rows=rows, **settings)
        with methods.quiet():
            own: Any = load_for_training(base, task, **settings)
            own.resize_token_embeddings(rows, mean_resizing=False)
            model: Any = PeftModel.from_pretrained(own, adapter)
            model.merge_and_unload(safe_merge=True).save_pretrained(place / "saved" / name)
        adapters.append({"name": name, "path": str(adapter), "base": str(base)})
    resized = {"name": "resized", "path": str(shelf.adapter("resized-vocabulary")), "base": str(shelf.base("llama"))}
    adapters.append(resized)
    (place / "gate.yml").write_text(json.dumps({"version": 1, "adapters": adapters, "publish": "merged"}))
    answer = merge_gate("run", "gate.yml", "--device", "cpu", cwd=place)
    assert answer.code == 0, answer.said
    return place


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_is_published_is_what_peft_saves(name: str, place: Path) -> None:
    """The files of a classifier's base have a head, too, which a classifier does not load."""
    published, saved = (read_tensors(place / part / name, WEIGHTS) for part in ("merged", "saved"))
    assert published.keys() - saved.keys() == ({"lm_head.weight"} if name == "classifier" else set())
    assert all(torch.equal(published[key], one) for key, one in saved.items())
    own, expected = (json.loads((place / part / name / "config.json").read_text()) for part in ("merged", "saved"))
    assert own == expected
    assert own["tie_word_embeddings"] is False


@pytest.mark.parametrize("name", ADAPTERS)
def test_both_are_the_merge(name: str, place: Path, shelf: Shelf) -> None:
    """What the class of an adapter's task lacks is no loss."""
    verifier = Verifier()
    for part in ("merged", "saved"):
        report = verifier.report(place / part / name, shelf.base(ADAPTERS[name][0]), place / "adapters" / name)
        assert report.verdict is Verdict.PASSED, (part, report.findings)
        assert "exact" in {finding.check for finding in report.findings}


@pytest.mark.parametrize(("name", "other"), [("embedding", "head"), ("head", "embedding"), ("both", "head")])
def test_another_untied_merge_fails(name: str, other: str, place: Path, shelf: Shelf) -> None:
    report = Verifier().report(place / "saved" / other, shelf.base("llama-tied"), place / "adapters" / name)
    assert report.verdict is Verdict.FAILED


def test_two_tensors_that_config_json_ties_are_an_error(place: Path, shelf: Shelf, tmp_path: Path) -> None:
    """A program that follows config.json loads one of them for both."""
    merged = Path(shutil.copytree(place / "saved" / "both", tmp_path / "merged"))
    config = json.loads((merged / "config.json").read_text()) | {"tie_word_embeddings": True}
    (merged / "config.json").write_text(json.dumps(config))
    report = Verifier().report(merged, shelf.base("llama-tied"), place / "adapters" / "both")
    assert (report.verdict, report.cause) == (Verdict.FAILED, "tied")


def test_a_note_counts_the_rows_that_the_unmerged_adapter_needs(place: Path) -> None:
    report = json.loads((place / "merge-gate-report" / "report.json").read_text())
    notes = {one["name"]: [note["hint"] for note in one["findings"]] for one in report["adapters"]}
    for name in ("resized", "more-rows"):
        (hint,) = notes.pop(name)
        assert f"resize the base to {ROWS} rows" in hint
    assert not any(notes.values())


def test_the_note_on_the_head_names_it(place: Path) -> None:
    report = json.loads((place / "merge-gate-report" / "report.json").read_text())
    notes = [one["message"] for base in report["bases"] for one in base["findings"]]
    assert any("lm_head.weight" in note and "LlamaForSequenceClassification" in note for note in notes)
