"""The same files give the same report, whatever the number of threads and whatever order the disk has them in."""

import shutil
from pathlib import Path

import pytest

from merge_gate.records.report import Report
from merge_gate.report.formats.json_report import read
from tests.support.command import merge_gate
from tests.support.small_fleet import BROKEN, lay_fleet, same

GATE = """\
version: 1
adapters:
  - {path: "./adapters/[pr]*", base: {model: ./llama, dtype: [float32, float16]}}
  - {path: "./adapters/f*", base: {model: ./llama-float16}}
  - {path: "./adapters/c*", base: {model: ./bert-classifier, dtype: bfloat16}}
checks: {rounding-loss: {severity: error, limit: 0.9}}
"""


def judged(place: Path, **environ: str) -> Report:
    answer = merge_gate("run", "gate.yml", "--device", "cpu", cwd=place, **environ)
    assert answer.code == 1, answer.said
    return read((place / "merge-gate-report" / "report.json").read_bytes(), "")


@pytest.mark.slow
def test_neither_threads_nor_order_of_files_change_a_report(shelf, tmp_path: Path) -> None:
    """Files that were made in the opposite order are listed in another by most file systems."""
    place, opposite = tmp_path / "place", tmp_path / "opposite"
    lay_fleet(shelf, place)
    (place / "gate.yml").write_text(GATE)
    for path in sorted(place.rglob("*"), reverse=True):
        if path.is_file():
            target = opposite / path.relative_to(place)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    report = judged(place, OMP_NUM_THREADS="3", MKL_NUM_THREADS="3")
    assert {one.name for one in report.adapters if one.cause} == set(BROKEN)
    assert same(judged(opposite, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")) == same(report)
