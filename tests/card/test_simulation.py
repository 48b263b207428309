"""The simulated card does what a card does, where the fleets depend on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.card import build, checks

ROOT = Path(__file__).resolve().parents[2]


def process(card: Path, *words: str, **settings: object) -> subprocess.CompletedProcess[str]:
    """A Python with simulated cards, outside of any worker."""
    env = os.environ | build.environment(card, **settings)
    env["PYTHONPATH"] += f"{os.pathsep}{ROOT}"
    return subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def failures(card: Path) -> dict[str, str]:
    """What each check reports; empty if it passed."""
    answer = process(card, "-m", "tests.support.card.checks", memory_mib=(1024, 1024))
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


@pytest.mark.parametrize("name", checks.MIXES)
def test_a_mix_of_devices_raises(name: str, failures: dict[str, str]) -> None:
    assert failures[name] == ""


@pytest.mark.parametrize("name", checks.CHECKS)
def test_a_card_computes(name: str, failures: dict[str, str]) -> None:
    assert failures[name] == ""


def test_a_host_read_of_the_cards_memory_ends_the_process(card: Path) -> None:
    program = "import ctypes, torch; ctypes.string_at(torch.ones(4, device='cuda').data_ptr(), 4)"
    assert process(card, "-c", program).returncode == -signal.SIGSEGV


LOST = """
import torch
values, index = torch.ones(3, device="cuda"), torch.tensor([7], device="cuda")
for attempt in (lambda: values[index], lambda: values + 1, torch.cuda.synchronize, torch.cuda.mem_get_info):
    try:
        attempt()
    except torch.AcceleratorError as error:
        print(str(error).splitlines()[0], error.error_code)
print(torch.ones(1) + 1)
"""


def test_an_index_out_of_range_loses_the_context(card: Path) -> None:
    *errors, last = process(card, "-c", LOST).stdout.splitlines()
    assert errors == ["CUDA error: device-side assert triggered 710"] * 4
    assert last == "tensor([2.])"


FAILING = """
import torch
try:
    torch.linalg.qr(torch.ones(2, 2, device="cuda"))
except RuntimeError as error:
    print(type(error).__name__, error)
print((torch.ones(1, device="cuda") + 1).tolist())
"""


@pytest.mark.parametrize(
    ("kind", "error", "survives"),
    [("lost", "AcceleratorError", False), ("cublas", "RuntimeError", True), ("memory", "OutOfMemoryError", True)],
)
def test_a_named_operator_fails(kind: str, error: str, survives: bool, card: Path) -> None:
    answer = process(card, "-c", FAILING, failures={"aten::linalg_qr": kind})
    assert answer.stdout.startswith(f"{error} CUDA ")
    assert answer.stdout.endswith("[2.0]\n") is survives
    assert (answer.returncode == 0) is survives


def test_a_second_build_is_the_first_one(card: Path) -> None:
    assert build.library() == card


def test_a_missing_compiler_is_named(variables, tmp_path: Path) -> None:
    variables["PATH"] = str(tmp_path)
    variables.pop("CXX", None)
    with pytest.raises(build.NoCompilerError, match="install g"):
        build.library(tmp_path)


# --- the engine's tensors are where a card needs them ----------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(card: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    answer = process(card, "-m", "tests.support.card.rows", str(tmp_path_factory.mktemp("rows")))
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["linear", "attention", "experts"])
def test_factors_are_on_the_card_in_their_own_dtype(kind: str, seen: dict[str, Any]) -> None:
    """Those of layers inside of a layer, too."""
    assert seen[kind] == {"during": ["cuda:0 torch.float32"], "after": ["cpu torch.float32"]}


def test_factors_with_indices_stay_on_the_cpu(seen: dict[str, Any]) -> None:
    assert seen["indices"]["during"] == seen["indices"]["after"] == ["cpu torch.float32"]


def test_a_quantized_merge_is_proved(seen: dict[str, Any]) -> None:
    assert seen["quantized"] > 0


def test_a_full_card_drops_the_weights_that_it_keeps(seen: dict[str, Any]) -> None:
    assert seen["full"] == [True, True, True]


def test_a_draw_on_the_card_is_taken_back(seen: dict[str, Any]) -> None:
    assert seen["drawn"] == [True, True]
