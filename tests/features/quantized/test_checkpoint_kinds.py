"""`merge-gate verify` on quantized directories: each fault has its kind in each format."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from merge_gate.config.from_arguments import config_of
from merge_gate.features.quantized.checkpoint import Checkpoint, open_checkpoint
from merge_gate.features.quantized.measurement import Measurement
from merge_gate.features.quantized.release_flow import findings_of
from merge_gate.features.verify.verify_flow import Verification
from merge_gate.files.base_files import read_base
from merge_gate.files.preflight import preflight
from merge_gate.records.files import Entry, Snapshot
from merge_gate.records.terms import Verdict
from merge_gate.run.view import View
from merge_gate.worker.supervisor import WorkerSlot
from tests.support.gating import SPEC
from tests.support.quantized.checkpoints import opened, read, saved
from tests.support.quantized.releases import FAULTS, Bench
from tests.support.quantized.writers import FORMATS, written_in

Write = Callable[..., tuple[Path, Checkpoint]]


@pytest.fixture
def write(bench: Bench, tmp_path: Path) -> Write:
    """A release of the base and an adapter in a format, as a directory and as the worker reads it."""

    def roundtrip(weight: torch.Tensor, name: str) -> torch.Tensor:
        written = written_in(name, {"a_proj.weight": weight})
        release = opened(tmp_path / "one", written, {"a_proj.weight": weight}, FORMATS[name][1])
        return read(release, "a_proj.weight")

    def made(name: str, fault: str, method: str = "lora", share: float = 0.03) -> tuple[Path, Checkpoint]:
        tensors = written_in(name, bench.faulty(fault, method, share, partial(roundtrip, name=name)))
        config = {**json.loads((bench.base() / "config.json").read_bytes()), "quantization_config": FORMATS[name][1]}
        files = saved(tmp_path / "release", tensors, config)
        base = saved(tmp_path / "base", {key: value.bfloat16() for key, value in bench.tensors().items()})
        return tmp_path / "release", open_checkpoint(files, base, "release")

    return made


@pytest.mark.parametrize(
    "name",
    ["MLX", *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(FORMATS.keys() - {"MLX"}))],
)
def test_a_right_release_of_each_format_passes(name: str, bench: Bench, write: Write) -> None:
    directory, _ = write(name, "right")
    config = config_of([str(bench.adapter("lora", 0.03))], base=str(bench.base()))
    with WorkerSlot() as worker:
        entry = Verification(config, str(directory), view=View(), worker=worker).compare().adapters[0]
    assert (entry.verdict, entry.cause) == (Verdict.PASSED, None), entry.findings[0]
    assert "1.00 ±" in entry.findings[0].message


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["lora", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("ia3", "dora"))]
)
@pytest.mark.parametrize(
    "fault", [name if name in {"base", "codes"} else pytest.param(name, marks=pytest.mark.nightly) for name in FAULTS]
)
@pytest.mark.parametrize("name", FORMATS)
def test_each_fault_has_its_kind(name: str, fault: str, method: str, bench: Bench, write: Write) -> None:
    _, release = write(name, fault, method)
    findings = bench.findings(release, method, 0.03, has_candidate=fault == "other")
    first = next(finding for finding in findings if finding.check != "strength")
    is_kept = fault == "codes" and (dict(first.measured)["factor"] > 0.9 or method == "ia3")  # 8 bits; scaled rows
    assert first.check == FAULTS[fault] or is_kept, first.message


def test_other_weights_in_the_directory_are_named(bench: Bench, write: Write) -> None:
    directory, _ = write("MLX", "right")
    names = ("consolidated.safetensors", "pytorch_model.bin", "model-00001-of-00002.safetensors", "training_args.bin")
    for name in names:
        (directory / name).write_bytes(b"")
    files = read_base(str(directory), name="release")
    members = (preflight(str(bench.adapter("lora", 0.03)), allow_pickle=False),)
    entry = Entry(spec=SPEC, dtype="auto", members=members)
    found = findings_of(Snapshot(name="", directory=str(directory), base_files=files), entry, Measurement(), {})
    (message,) = (one.message for one in found if one.check == "stale-shards")
    assert message == (
        '3 files of weights next to those that were measured ("model.safetensors"): "consolidated.safetensors", '
        '"model-00001-of-00002.safetensors", "pytorch_model.bin"'
    )
