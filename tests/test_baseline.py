"""A baseline accepts a failure of adapter and base together on this base, in this dtype, and nowhere else."""

import shutil
from pathlib import Path

import yaml

from tests.support.command import Answer, entries, merge_gate, strict_json
from tests.support.faults import LARGE_DELTA
from tests.support.models import Shelf, read_tensors, write_tensors

MODEL = "model.safetensors"


def gate(place: Path, base: str, dtype: str = "float16", **keys: str) -> Answer:
    config = {"version": 1, "base": {"model": base, "dtype": dtype}, "adapters": ["./a"], **keys}
    (place / "merge-gate.yml").write_text(yaml.safe_dump(config))
    return merge_gate("run", "-o", "out", cwd=place)


def test_a_failure_is_accepted_on_its_base_alone(shelf: Shelf, tmp_path: Path) -> None:
    shutil.copytree(shelf.adapter("plain"), tmp_path / "a")
    LARGE_DELTA(tmp_path / "a")
    for name in ("one", "two"):
        shutil.copytree(shelf.base("llama"), tmp_path / name)
    tensors = read_tensors(tmp_path / "two", MODEL)
    write_tensors(tmp_path / "two", {key: tensor * 1.5 for key, tensor in tensors.items()}, MODEL)
    assert gate(tmp_path, "./one").code == 1
    report = strict_json(tmp_path / "out" / "report.json")
    words = ("--only", "a", "--until", "2999-12-31", "--owner", "me", "--reason", "known")
    answer = merge_gate("report", "baseline", "out", *words, cwd=tmp_path)
    assert answer.code == 0, answer.said
    (entry,) = yaml.safe_load(answer.out)["accept"]
    assert (entry["cause"], entry["base"]) == ("merged-nonfinite", report["bases"][0]["sha256"])
    (tmp_path / "known.yml").write_text(answer.out)
    assert gate(tmp_path, "./one", baseline="known.yml").code == 0
    for base, dtype in (("./two", "float16"), ("./one", "float32")):
        answer = gate(tmp_path, base, dtype, baseline="known.yml")
        assert answer.code == 1, answer.said
        assert "matches nothing in this run" in " ".join(answer.out.split())
        assert entries(tmp_path / "out")[0]["accepted"] is None
    # Entries of earlier versions name no base.
    old = {key: value for key, value in entry.items() if key not in {"base", "dtype", "quantization"}}
    (tmp_path / "known.yml").write_text(yaml.safe_dump({"version": 1, "accept": [old]}))
    answer = gate(tmp_path, "./one", baseline="known.yml")
    assert answer.code == 1, answer.said
    assert "make it again with `merge-gate report baseline --only NAME`" in " ".join(answer.out.split())
