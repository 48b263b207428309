"""`merge-gate check` and the gate look at a base's files before anything is loaded: verdicts, exit codes, no torch."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from merge_gate.config.load_config import load_config
from merge_gate.records.options import RunOptions
from merge_gate.records.terms import Verdict
from merge_gate.run import view as views
from merge_gate.run.checked_files import check_files
from merge_gate.run.flow import run_gate
from tests.support.files.base_directories import GPTQ, MODEL, PLAIN, lay, plus, safetensors

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4400000000\n"


def lay_adapter(directory: Path, base: str, **files: bytes) -> None:
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["up_proj"], "base_model_name_or_path": base}
    sizes = {"lora_A": ("F32", (2, 4)), "lora_B": ("F32", (8, 2))}
    tensors = {f"base_model.model.model.layers.0.mlp.up_proj.{name}.weight": part for name, part in sizes.items()}
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(config))
    (directory / "adapter_model.safetensors").write_bytes(files.get("weights", safetensors(tensors)))


def checked(place: Path, base: Mapping[str, Any] | None = None) -> tuple[list[tuple[str, str | None]], list[str]]:
    """(verdict, cause) of each adapter, and the notes."""
    config = {"version": 1, "adapters": ["./adapter*"]} | ({"base": base} if base else {})
    (place / "gate.yml").write_text(json.dumps(config))
    view, notes = views.View(), list[str]()
    view.note = notes.append  # type: ignore[method-assign]
    found = check_files(load_config(str(place / "gate.yml")), view=view)
    return [(one.verdict.value, one.cause) for one in found], notes


@pytest.fixture
def place(tmp_path: Path) -> Path:
    lay_adapter(tmp_path / "adapter", "./base")
    return tmp_path


def test_a_sound_base_is_sound(place: Path) -> None:
    lay(place / "base", {MODEL: safetensors(PLAIN)})
    assert checked(place) == ([("passed", None)], [])


@pytest.mark.parametrize(
    ("weights", "cause"),
    [(LFS, "base-incomplete"), (b"PK\3\4", "base-inconsistent"), (safetensors(plus(**GPTQ)), "base-format")],
)
def test_a_broken_base_is_not_sound(weights: bytes, cause: str, place: Path) -> None:
    lay(place / "base", {MODEL: weights})
    assert checked(place)[0] == [("error", cause)]


def test_an_absent_base_is_not_sound_and_no_hub_id_is_read(place: Path) -> None:
    assert checked(place)[0] == [("error", "not-judged")]
    for name in ("adapter-hub", "adapter-hub-2"):
        lay_adapter(place / name, "acme/llama")
    verdicts, notes = checked(place)
    assert verdicts == [("error", "not-judged"), ("passed", None), ("passed", None)]
    assert len([note for note in notes if "acme/llama" in note]) == 1


def test_the_dtype_and_the_quantization_that_are_asked_for(place: Path) -> None:
    lay(place / "base", {MODEL: safetensors(PLAIN)}, torch_dtype="fp16")
    assert checked(place)[0] == [("error", "base-inconsistent")]
    assert checked(place, {"model": "./base", "dtype": "float16"})[0] == [("passed", None)]
    tensors = plus(weight=("F8_E4M3", (8, 4)), weight_scale_inv=("F32", (2, 1)))
    declared = {"quant_method": "fp8", "weight_block_size": [4, 4]}
    lay(place / "base", {MODEL: safetensors(tensors)}, quantization_config=declared)
    assert checked(place, {"model": "./base"})[0] == [("passed", None)]
    assert checked(place, {"model": "./base", "quantization": "bnb-4bit"})[0] == [("error", "base-format")]


def test_the_gate_settles_all_entries_without_loading_the_base(place: Path) -> None:
    lay(place / "base", {MODEL: safetensors(plus(**GPTQ))})
    base = {"model": "./base", "dtype": ["float32", "float16"]}
    (place / "gate.yml").write_text(json.dumps({"version": 1, "base": base, "adapters": ["./adapter"]}))
    report = run_gate(load_config(str(place / "gate.yml")), RunOptions(device="cpu"))
    assert [(one.verdict, one.cause) for one in report.adapters] == [(Verdict.ERROR, "base-format")] * 2
    assert [one.dtype for one in report.bases] == ["float32", "float16"]
    assert all(one.findings[0].check == "base-format" for one in report.bases)


def test_check_imports_no_torch_for_a_base(place: Path) -> None:
    lay(place / "base", {MODEL: LFS})
    script = (
        "import sys; from merge_gate.cli.dispatch import main; code = main(['check', './adapter']);"
        "print(code, [name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", script], cwd=place, capture_output=True, text=True, check=False)
    assert answer.stdout.splitlines()[-1] == "3 []", answer.stderr
