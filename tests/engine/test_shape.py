"""Which class a base is loaded with, and with how many labels: as the adapter's user would load it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from peft import LoraConfig

from merge_gate.config.load import load_config
from merge_gate.engine.base import load_base
from merge_gate.engine.shape import shape_for
from merge_gate.errors import EngineError
from merge_gate.gate import run_gate
from merge_gate.records.report import AdapterReport, Report
from merge_gate.records.terms import Severity, Verdict
from merge_gate.sources.preflight import preflight
from tests.models import VARIANTS, read_config, read_tensors, save_adapter, write_config, write_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from tests.models import Shelf

QV = {"r": 4, "target_modules": ["query", "value"]}


def gate(directory: Path, base: Path, *adapters: Path) -> Report:
    config = {"version": 1, "base": {"model": str(base)}, "adapters": [{"path": str(one)} for one in adapters]}
    (directory / "gate.yml").write_text(json.dumps(config))
    return run_gate(load_config(str(directory / "gate.yml")), device="cpu")


def told(report: AdapterReport) -> str:
    return "\n".join(f"{f.severity} {f.check}: {f.message} [{f.hint}]" for f in report.findings)


def set_task(adapter: Path, task_type: str | None) -> None:
    write_config(adapter, read_config(adapter) | {"task_type": task_type})


def test_a_head_of_another_size_gives_way_to_the_adapters(shelf: Shelf, tmp_path: Path) -> None:
    base = shelf.base("bert-classifier")
    save_adapter(shelf.base("bert"), tmp_path / "five", LoraConfig(task_type="SEQ_CLS", **QV), num_labels=5)
    report = gate(tmp_path, base, tmp_path / "five")
    (adapter,) = report.adapters
    assert adapter.verdict is Verdict.PASSED, told(adapter)
    assert report.bases[0].replaced == ("classifier.bias", "classifier.weight")


def test_a_base_whose_config_is_of_another_model_is_named(shelf: Shelf, tmp_path: Path) -> None:
    base = shelf.base("bert-classifier")
    broken = tmp_path / "base"
    broken.mkdir()
    for file in base.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    save_adapter(base, tmp_path / "a", LoraConfig(task_type="SEQ_CLS", **QV))
    shape = shape_for(str(broken), preflight(str(tmp_path / "a"), allow_pickle=False))
    with pytest.raises(EngineError, match=r"intermediate.*\[48.*needs \[40") as caught:
        load_base(str(broken), shape=shape, label="b")
    assert "report" not in caught.value.message


@pytest.mark.parametrize("base", ["bert", "bert-classifier"])
def test_names_of_the_bare_model_outweigh_the_task_type(shelf: Shelf, tmp_path: Path, base: str) -> None:
    save_adapter(shelf.base("bert"), tmp_path / "a", LoraConfig(task_type="FEATURE_EXTRACTION", **QV))
    set_task(tmp_path / "a", "SEQ_CLS")
    (adapter,) = gate(tmp_path, shelf.base(base), tmp_path / "a").adapters
    assert adapter.verdict is Verdict.PASSED, told(adapter)
    (finding,) = (f for f in adapter.findings if "BertForSequenceClassification" in f.message)
    assert (finding.check, finding.severity) == ("base-mismatch", Severity.WARNING)
    assert "BertModel" in finding.message


def test_names_of_a_model_with_a_head_outweigh_the_task_type(shelf: Shelf, tmp_path: Path) -> None:
    base = shelf.base("bert-classifier")
    save_adapter(base, tmp_path / "a", LoraConfig(task_type="SEQ_CLS", **QV))
    write_tensors(tmp_path / "a", {k: v for k, v in read_tensors(tmp_path / "a").items() if "classifier" not in k})
    write_config(tmp_path / "a", read_config(tmp_path / "a") | {"modules_to_save": None})
    set_task(tmp_path / "a", "FEATURE_EXTRACTION")
    (adapter,) = gate(tmp_path, base, tmp_path / "a").adapters
    assert adapter.verdict is Verdict.PASSED, told(adapter)
    assert any("BertForSequenceClassification" in finding.message for finding in adapter.findings)


def test_an_untrained_adapter_of_the_bare_model_has_no_effect(shelf: Shelf, tmp_path: Path) -> None:
    save_adapter(shelf.base("bert"), tmp_path / "a", LoraConfig(task_type="FEATURE_EXTRACTION", **QV))
    set_task(tmp_path / "a", "SEQ_CLS")
    zeroed = {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in read_tensors(tmp_path / "a").items()}
    write_tensors(tmp_path / "a", zeroed)
    (adapter,) = gate(tmp_path, shelf.base("bert"), tmp_path / "a").adapters
    assert (adapter.verdict, adapter.cause) == (Verdict.FAILED, "no-effect"), told(adapter)


def test_names_that_fit_no_class_leave_the_task_types(shelf: Shelf, tmp_path: Path) -> None:
    save_adapter(shelf.base("bert"), tmp_path / "a", LoraConfig(task_type="FEATURE_EXTRACTION", **QV))
    renamed = {k.replace("encoder", "transformer"): v for k, v in read_tensors(tmp_path / "a").items()}
    write_tensors(tmp_path / "a", renamed)
    shape = shape_for(str(shelf.base("bert")), preflight(str(tmp_path / "a"), allow_pickle=False))
    assert (shape.class_name, shape.instead_of) == ("BertModel", None)


@pytest.mark.parametrize("variant", ["plain", "conv1d", "opt", "fused-experts", "classifier", "feature-extraction"])
def test_two_names_of_one_class_share_a_load(shelf: Shelf, tmp_path: Path, variant: str) -> None:

    base, adapter = shelf.base(VARIANTS[variant].base), shelf.adapter(variant)
    shapes = set()
    for task_type in (read_config(adapter)["task_type"], None):
        directory = tmp_path / str(task_type)
        directory.mkdir()
        for file in adapter.iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        set_task(directory, task_type)
        shapes.add(shape_for(str(base), preflight(str(directory), allow_pickle=False)))
    assert len(shapes) == 1
