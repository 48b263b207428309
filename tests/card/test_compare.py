"""What counts as a difference between a CPU and a card. No test here needs a card."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.card import compare

BASE = {"model": "./base", "dtype": "float32", "quantization": "none"}


def report(name: str = "support") -> dict[str, Any]:
    entry = {
        "name": name,
        "base": BASE,
        "verdict": "passed",
        "cause": None,
        "findings": [{"check": "headroom", "message": "0.51 of 65,504"}],
        "coverage": {"layers_in_blocks": 4},
        "forward": {"largest": 2.0, "largest_difference": 1e-6},
        "seconds": 1.0,
    }
    return {"adapters": [entry], "bases": [BASE | {"parameters": 12}]}


def changed(field: str, value: object, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two reports, the second with another value in a field of its adapter."""
    cpu = report(name)
    card = copy.deepcopy(cpu)
    *path, last = field.split(".")
    place = card["adapters"][0]
    for key in path:
        place = place[int(key) if key.isdecimal() else key]
    place[last] = value
    return cpu, card


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("verdict", "failed", "verdict"),
        ("findings", [], "finding"),
        ("findings.0.message", "0.52 of 65,504", "finding"),
        ("coverage.layers_in_blocks", 3, "coverage"),
        ("forward.largest", 2.000001, "figure"),
        ("forward.largest_difference", 1e-3, "figure"),
    ],
)
def test_a_changed_field_is_a_difference(field: str, value: object, kind: str) -> None:
    assert [found.kind for found in compare.of_reports(*changed(field, value, "support"))] == [kind]


@pytest.mark.parametrize(
    ("field", "value", "name", "is_real"),
    [
        ("seconds", 9.0, "support", False),
        ("forward.largest_difference", 2e-6, "support", False),
        ("forward.largest", 2.00000001, "support", False),
        ("forward.largest", 2.0001, "lora-conv2d", False),
        ("forward.largest", 2.01, "support", True),
        ("findings.0.message", "0.52 of 65,504", "support", True),
    ],
)
def test_what_may_differ_is_no_difference(field: str, value: object, name: str, is_real: bool) -> None:
    assert compare.of_reports(*changed(field, value, name), is_real=is_real) == []


def test_a_missing_adapter_is_a_difference() -> None:
    card = report() | {"adapters": []}
    assert [found.name for found in compare.of_reports(report(), card)] == ["support float32"]


@pytest.mark.parametrize(("name", "differences"), [("support", 1), ("lora-conv2d", 0)])
def test_a_last_bit_may_differ_in_a_convolution_only(name: str, differences: int, tmp_path: Path) -> None:
    weight = torch.linspace(-1, 1, 12).view(3, 4)
    nudged = weight.clone()
    nudged[1, 2] = torch.nextafter(nudged[1, 2], torch.tensor(2.0))
    for device, tensor in (("cpu", weight), ("card", nudged)):
        (tmp_path / device / name).mkdir(parents=True)
        save_file({"weight": tensor}, tmp_path / device / name / "model.safetensors")
    found = compare.of_published(tmp_path / "cpu", tmp_path / "card")
    assert [difference.kind for difference in found] == ["bits"] * differences
    (tmp_path / "cpu" / "second").mkdir()
    assert len(compare.of_published(tmp_path / "cpu", tmp_path / "card")) == differences + 1
