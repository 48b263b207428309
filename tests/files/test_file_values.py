"""`merge-gate check` finds NaN and Inf in adapter files, without torch."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from merge_gate.cli.dispatch import main
from merge_gate.files.file_values import BLOCK_BYTES, has_rule, nonfinite
from merge_gate.files.headers import DTYPE_BITS, parse_places
from tests.support.command import merge_gate, strict_json
from tests.support.files.adapter_files import pack
from tests.support.models import Shelf, read_config, read_tensors, to_pickle, write_config, write_tensors

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
         "C64": torch.complex64, "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn,
         "F8_E8M0": torch.float8_e8m0fnu}  # fmt: skip
MIB_100 = 100 << 20


def file_of(path: Path, dtype: str, shape: tuple[int, ...], data: bytes) -> Path:
    entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [0, len(data)]}
    path.write_bytes(pack(json.dumps({"x": entry}).encode(), data))
    return path


def counted(path: Path) -> list[tuple[int, int, int, tuple[int, ...] | None]]:
    with path.open("rb") as file:
        return [
            (found.nan, found.posinf, found.neginf, found.first_index) for found in nonfinite(file, parse_places(file))
        ]


@pytest.mark.parametrize("dtype", TORCH)
def test_every_bit_pattern_is_what_torch_says(dtype: str, tmp_path: Path) -> None:
    """All patterns of 8 and 16 bits; of longer values, all of their last two bytes, with zeros and ones before them."""
    kind = TORCH[dtype]
    part = 4 if dtype == "C64" else kind.itemsize
    bits = np.arange(256 if part == 1 else 65536, dtype=np.uint64) << np.uint64(8 * max(0, part - 2))
    for rest in (0, 1) if part > 2 else (0,):
        data = (bits + np.uint64(rest)).astype(f"u{part}").tobytes()
        values = torch.frombuffer(bytearray(data), dtype=torch.float32 if dtype == "C64" else kind).double()
        masks = (values.isnan(), values.isposinf(), values.isneginf())
        first = int((~values.isfinite()).nonzero()[0]) // (2 if dtype == "C64" else 1)
        found = counted(file_of(tmp_path / "x", dtype, (len(data) // kind.itemsize,), data))
        assert found == [(*(int(mask.sum()) for mask in masks), (first,))]


def test_the_other_dtypes() -> None:
    without = {"F8_E4M3FNUZ", "F8_E5M2FNUZ"}
    assert {dtype for dtype in DTYPE_BITS if not has_rule(dtype)} == without


@pytest.mark.parametrize("place", [0, BLOCK_BYTES // 4 - 1, BLOCK_BYTES // 4, 700_000, 1024 * 1024 - 1])
def test_the_first_index_in_any_block(place: int, tmp_path: Path) -> None:
    values = np.zeros(1024 * 1024, np.float32)
    values[place:] = np.nan
    found = counted(file_of(tmp_path / "x", "F32", (1024, 1024), values.tobytes()))
    assert found == [(len(values) - place, 0, 0, divmod(place, 1024))]


# --- the command -----------------------------------------------------------------------------------------------------


def poisoned(part: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        tensors = read_tensors(directory)
        tensors[max(name for name in tensors if part in name)].view(-1)[5] = torch.nan
        write_tensors(directory, tensors)

    return change


def with_regex(directory: Path) -> None:
    write_config(directory, read_config(directory) | {"target_modules": r".*\.(q_proj|v_proj)"})
    poisoned("lora_B")(directory)


def stray(directory: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"
    write_tensors(directory, read_tensors(directory) | {name: torch.full((4, 32), torch.inf)})


CASES: dict[str, tuple[str, Callable[[Path], Any], int, str]] = {
    "a factor": ("plain", poisoned("lora_B"), 1, "error"),
    "a magnitude": ("dora", poisoned("magnitude"), 1, "error"),
    "a trained head": ("modules-to-save", poisoned("lm_head"), 1, "error"),
    "an expression": ("plain", with_regex, 0, "warning"),
    "a module that is no target": ("plain", stray, 0, "warning"),
    "modules that are left out": ("excluded", poisoned("lora_B"), 0, "warning"),
    "some layers": ("layers-to-transform", poisoned("lora_B"), 0, "warning"),
}


@pytest.mark.parametrize("kind", CASES)
def test_check_finds_it(kind: str, shelf: Shelf, tmp_path: Path, wording, capsys) -> None:
    variant, change, code, severity = CASES[kind]
    shutil.copytree(shelf.adapter(variant), tmp_path / "a")
    change(tmp_path / "a")
    with chdir(tmp_path):
        assert main(["check", "a/adapter_config.json", "--report", "json=out.json"]) == code
    found = strict_json(tmp_path / "out.json")["adapters"][0]["findings"]
    (finding,) = [one for one in found if one["check"] == "adapter-nonfinite"]
    assert finding["severity"] == severity
    wording(f"{finding['message']}\n> {finding['hint']}")


def test_run_has_the_same_finding_once(shelf: Shelf, tmp_path: Path) -> None:
    """The merge decides where adapter_config.json does not: `b` names its targets by an expression."""
    shutil.copytree(shelf.adapter("plain"), tmp_path / "a")
    shutil.copytree(shelf.adapter("plain"), tmp_path / "b")
    poisoned("lora_B")(tmp_path / "a")
    with_regex(tmp_path / "b")
    found = []
    for command in ("check", "run"):
        answer = merge_gate(command, "a", "b", "--base", shelf.base("llama"), "--report", "json=out.json", cwd=tmp_path)
        assert answer.code == 1, answer.said
        for entry in strict_json(tmp_path / "out.json")["adapters"]:
            (finding,) = [one for one in entry["findings"] if one["check"] == "adapter-nonfinite"]
            found.append(finding)
    (a, b, run_a, run_b), words = found, ("message", "hint")
    assert a == run_a
    assert (b["severity"], run_b["severity"]) == ("warning", "error")
    assert all(run_b[key] == run_a[key] for key in words)
    assert b | {key: run_b[key] for key in (*words, "severity")} == run_b


def test_what_is_not_read_is_named(shelf: Shelf, tmp_path: Path, capsys) -> None:
    """Values in a dtype without a rule, and pickled weights."""
    shutil.copytree(shelf.adapter("plain"), tmp_path / "a")
    shutil.copytree(shelf.adapter("plain"), tmp_path / "b")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    values = torch.zeros(4, 32, dtype=torch.float8_e4m3fnuz)
    write_tensors(tmp_path / "a", read_tensors(tmp_path / "a") | {name: values})
    to_pickle(tmp_path / "b")
    with chdir(tmp_path):
        assert main(["check", "a", "b", "--allow-pickle", "--report", "json=out.json"]) == 0
    (note,) = [one for one in strict_json(tmp_path / "out.json")["adapters"][0]["findings"]
               if one["check"] == "adapter-nonfinite"]  # fmt: skip
    assert note["severity"] == "note"
    assert "F8_E4M3FNUZ" in note["message"]
    last = " ".join(capsys.readouterr().out.split())
    assert "checks the base and the merge, pickled weights, tensors in dtypes without a rule" in last


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "is_nan"), [("F32", False), ("BF16", False), ("F16", False), ("F32", True)])
def test_100_mib_take_little_time(dtype: str, is_nan: bool, tmp_path: Path) -> None:
    count = MIB_100 // TORCH[dtype].itemsize
    values = torch.full((count,), torch.nan) if is_nan else torch.randn(count) * 0.02
    path = file_of(
        tmp_path / "x", dtype, (count // 64, 64), values.to(TORCH[dtype]).view(torch.uint8).numpy().tobytes()
    )
    before = resource.getrusage(resource.RUSAGE_SELF)
    assert len(counted(path)) == is_nan
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < (2.0 if is_nan else 0.6)
