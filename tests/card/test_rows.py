"""The engine's tensors are where a card needs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.card import build

ROOT = Path(__file__).resolve().parents[2]
ON_CARD = {"during": ["cuda:0 torch.float32"], "after": ["cpu torch.float32"]}


@pytest.fixture(scope="module")
def seen(card: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    env = os.environ | build.environment(card)
    env["PYTHONPATH"] += f"{os.pathsep}{ROOT}"
    command = [sys.executable, "-m", "tests.support.card.rows", str(tmp_path_factory.mktemp("rows"))]
    answer = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["linear", "attention", "experts"])
def test_factors_are_on_the_card_in_their_own_dtype(kind: str, seen: dict[str, Any]) -> None:
    """Those of layers inside of a layer, too."""
    assert seen[kind] == ON_CARD


def test_factors_with_indices_stay_on_the_cpu(seen: dict[str, Any]) -> None:
    assert seen["indices"]["during"] == seen["indices"]["after"] == ["cpu torch.float32"]


def test_a_quantized_merge_is_proved(seen: dict[str, Any]) -> None:
    assert seen["quantized"] > 0


def test_a_full_card_drops_the_weights_that_it_keeps(seen: dict[str, Any]) -> None:
    assert seen["full"] == [True, True, True]


def test_a_draw_on_the_card_is_taken_back(seen: dict[str, Any]) -> None:
    assert seen["drawn"] == [True, True]
