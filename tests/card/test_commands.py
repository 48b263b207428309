"""What users run on a card, from a published model to a card that fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import methods
from tests.support.card import build, compare
from tests.support.card.fleets import Workshop
from tests.support.card.runs import CPU, Device, Run, judge, judge_on_both
from tests.support.command import merge_gate
from tests.support.faults import configure
from tests.support.models import read_config

pytestmark = pytest.mark.filterwarnings("ignore")  # of what PEFT and transformers write
PASSED = ("passed", None)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("adapters"))


def config(directory: Path, workshop: Workshop, *names: str, dtype: str = "float32") -> Path:
    """A configuration of adapters of tests/support/methods.py."""
    return write(directory, [{"name": name} | workshop.entry(methods.find(name), dtype) for name in names])


def write(directory: Path, entries: list[dict[str, Any]]) -> Path:
    path = directory / "gate.yml"
    path.write_text(json.dumps({"version": 1, "adapters": entries}))
    return path


@pytest.fixture
def cuda(card: Path) -> Device:
    return Device(name="cuda", environment=build.environment(card))


def finding(run: Run, name: str) -> str:
    """The message of an adapter's first finding."""
    (entry,) = (entry for entry in run.report["adapters"] if entry["name"] == name)
    return entry["findings"][0]["message"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_a_card_published_is_verified(
    dtype: str, cuda: Device, workshop: Workshop, tmp_path: Path
) -> None:
    path = config(tmp_path, workshop, "lora-linear", dtype=dtype)
    judged = judge(path, cuda, publishes=True)
    assert judged.answer.code == 0, judged.answer.said
    (entry,) = json.loads(path.read_text())["adapters"]
    merged = judged.published / "lora-linear"
    inputs = ("--base", entry["base"]["model"], "--adapter", entry["path"])
    for environment in (cuda.environment, CPU.environment):
        answer = merge_gate("verify", merged, *inputs, cwd=tmp_path, **environment)
        assert answer.code == 0, answer.said


def test_an_export_next_to_a_card_is_the_cpus(card: Path, workshop: Workshop, tmp_path: Path) -> None:
    (entry,) = json.loads(config(tmp_path, workshop, "lora-patterns").read_text())["adapters"]
    for name, environment in (("cpu", {}), ("card", build.environment(card))):
        words = ("export", entry["path"], "--base", entry["base"]["model"], "--output", name)
        answer = merge_gate(*words, cwd=tmp_path, **environment)
        assert answer.code == 0, answer.said
    assert [*compare.of_models("export", tmp_path / "cpu", tmp_path / "card")] == []


def test_the_second_card_merges_alone(card: Path, workshop: Workshop, tmp_path: Path) -> None:
    """The first card has no memory: a tensor that lands there fails."""
    path = config(tmp_path, workshop, "lora-linear", "lora-dora", "lora-mha", "lora-experts", "adalora-linear")
    device = Device(name="cuda:1", environment=build.environment(card, memory_mib=(0, 1024)))
    cpu, on_card = judge_on_both(path, device)
    assert on_card.report["environment"]["device"] == "cuda:1"
    assert compare.of_reports(cpu.report, on_card.report) == []


def test_a_card_that_is_not_there_is_refused(card: Path, workshop: Workshop, tmp_path: Path) -> None:
    device = Device(name="cuda:2", environment=build.environment(card, memory_mib=(1024, 1024)))
    judged = judge(config(tmp_path, workshop, "lora-linear"), device)
    assert judged.answer.code == 3
    assert "2 CUDA devices" in finding(judged, "lora-linear")


def test_a_full_card_costs_the_adapter_that_fills_it(card: Path, workshop: Workshop, tmp_path: Path) -> None:
    path = config(tmp_path, workshop, "lora-linear", "lora-tall", "lora-dora")
    judged = judge(path, Device(name="cuda", environment=build.environment(card, memory_mib=(3,))))
    assert judged.verdicts() == {"lora-linear": PASSED, "lora-tall": ("error", "not-judged"), "lora-dora": PASSED}
    assert "out of memory" in finding(judged, "lora-tall")


@pytest.mark.parametrize("kind", ["lost", "cublas"])
def test_an_error_of_the_card_costs_the_adapter_in_progress(
    kind: str, card: Path, workshop: Workshop, tmp_path: Path
) -> None:
    path = config(tmp_path, workshop, "lora-linear", "c3a-linear", "lora-dora")
    device = Device(name="cuda", environment=build.environment(card, failures={"aten::_fft_r2c": kind}))
    judged = judge(path, device)
    assert judged.verdicts() == {"lora-linear": PASSED, "c3a-linear": ("error", "not-judged"), "lora-dora": PASSED}
    assert "CUDA error" in finding(judged, "c3a-linear")


@pytest.mark.parametrize("kind", ["memory", "cublas"])
def test_an_error_of_the_card_does_not_refuse_a_combination(
    kind: str, card: Path, workshop: Workshop, tmp_path: Path
) -> None:
    """On a quantized base, the factors are on the card while PEFT combines them."""
    member = workshop.entry(methods.find("lora-linear"), "bfloat16", quantization="bnb-8bit")
    combine = {"method": "svd", "adapters": ["first", "second"], "weights": [0.6, 0.4]}
    entries = [member | {"name": name} for name in combine["adapters"]]
    path = write(tmp_path, [*entries, {"name": "both", "combine": combine, "base": member["base"]}])
    judged = judge(path, Device(name="cuda", environment=build.environment(card, failures={"aten::_linalg_svd": kind})))
    assert judged.verdicts() == {"first": PASSED, "second": PASSED, "both": ("error", "not-judged")}


def test_an_index_out_of_range_is_the_adapters_fault(cuda: Device, workshop: Workshop, tmp_path: Path) -> None:
    """On a card, it would end the context, and the verdicts of the adapters after it."""
    names = ("lora-linear", "supertuning-linear", "lora-dora")
    entries = [{"name": name} | workshop.entry(methods.find(name), "float32") for name in names]
    tensors = methods.load_file(Path(entries[1]["path"]) / methods.WEIGHTS)
    for tensor in tensors.values():
        if not tensor.is_floating_point():
            tensor.view(-1)[-1] = 100_000
    entries[1]["path"] = str(methods.write_variant(Path(entries[1]["path"]), tmp_path / "broken", tensors))
    cpu, on_card = judge_on_both(write(tmp_path, entries), cuda)
    assert on_card.verdicts()["supertuning-linear"] == ("failed", "shape-mismatch")
    assert compare.of_reports(cpu.report, on_card.report) == []


def test_no_setting_of_the_caller_rounds_to_tf32(card: Path, workshop: Workshop, tmp_path: Path) -> None:
    path = config(tmp_path, workshop, "lora-linear", "lora-conv2d", "lora-conv1d")
    override = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "NVIDIA_TF32_OVERRIDE": "1"}
    device = Device(name="cuda", environment=build.environment(card) | override)
    cpu, on_card = judge_on_both(path, device, publishes=True)
    assert on_card.report["environment"]["device"] == "cuda:0"
    assert compare.of_reports(cpu.report, on_card.report) == []
    assert compare.of_published(cpu.published, on_card.published) == []


def test_the_table_of_a_real_card_says_if_there_was_none(card: Path) -> None:
    words = [sys.executable, "-m", "tests.tools.card_real", "--fleets", "--no-benchmarks"]
    simulated = subprocess.run([*words, "--simulated"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert simulated.returncode == 0, simulated.stderr
    assert simulated.stdout.count("NO REAL CARD WAS USED") == 2


def test_a_token_out_of_range_is_the_adapters_fault(cuda: Device, workshop: Workshop, tmp_path: Path) -> None:
    """The embedding of a quantized base is on the card when PEFT reads the tokens' rows."""
    entry = workshop.entry(methods.find("lora-tokens"), "bfloat16", quantization="bnb-8bit")
    broken = shutil.copytree(entry["path"], tmp_path / "broken")
    first, *_ = read_config(broken)["trainable_token_indices"]
    configure(trainable_token_indices=[first, 9_999])(broken)
    path = write(tmp_path, [entry | {"name": "broken", "path": str(broken)}, entry | {"name": "good"}])
    cpu, on_card = judge_on_both(path, cuda)
    assert cpu.verdicts() == {"broken": ("failed", "shape-mismatch"), "good": PASSED}
    assert on_card.verdicts() == cpu.verdicts()
