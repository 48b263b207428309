"""Bases that may be those of an adapter, by names and shapes; for `init`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merge_gate.cli.dispatch import main
from merge_gate.config.load_config import load_config
from merge_gate.files.fitting_bases import fits
from tests.support.models import Shelf, llama

A, B = "base_model.model.model.layers.0.q.lora_A.weight", "base_model.model.model.layers.0.q.lora_B.weight"
ADAPTER = {A: torch.zeros(4, 8), B: torch.zeros(16, 4)}


@pytest.mark.parametrize(
    ("weights", "adapter", "expected"),
    [
        ({"model.layers.0.q.weight": (16, 8)}, ADAPTER, True),
        ({"layers.0.q.weight": (16, 8), "lm_head.weight": (16, 8)}, ADAPTER, True),
        ({"model.layers.0.q.weight": (8, 16)}, ADAPTER, True),
        ({"model.layers.0.q.weight": (16, 9)}, ADAPTER, False),
        ({"model.layers.0.k.weight": (16, 8)}, ADAPTER, False),
        ({"model.layers.0.q.weight": (16, 8)}, {"a": torch.zeros(1)}, False),
        ({}, ADAPTER, False),
    ],
    ids=["its own", "without a head", "transposed", "other shape", "other names", "no factors", "nothing"],
)
def test_names_and_shapes_decide(
    tmp_path: Path, weights: dict[str, tuple[int, int]], adapter: dict[str, torch.Tensor], expected: bool
) -> None:
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    (tmp_path / "base").mkdir()
    save_file({name: torch.zeros(shape) for name, shape in weights.items()}, tmp_path / "base" / "model.safetensors")
    assert fits(str(tmp_path), str(tmp_path / "base")) is expected


def test_a_damaged_file_fits_nothing(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"damaged")
    assert not fits(str(tmp_path), str(tmp_path))


def test_init_writes_the_base_that_lies_next_to_the_adapters(shelf: Shelf, cwd: Path) -> None:
    """Two adapters of trainers elsewhere, two bases here, of which one fits."""
    (cwd / "models").mkdir()
    shutil.copytree(shelf.base("llama"), cwd / "models" / "llama")
    llama(hidden_size=64).save_pretrained(cwd / "models" / "wide")
    for name in ("one", "two"):
        shutil.copytree(shelf.adapter("plain"), cwd / "adapters" / name)
        path = cwd / "adapters" / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": f"/mnt/{name}"}))
    assert main(["init", "adapters"]) == 0
    assert {spec.base.model for spec in load_config("merge-gate.yml").adapters} == {str(cwd / "models" / "llama")}
