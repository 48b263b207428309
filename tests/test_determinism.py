"""The same files give the same report, whatever the number of threads and whatever order the disk has them in."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from merge_gate.report.formats.json_report import read
from tests.support.command import merge_gate
from tests.support.small_fleet import BROKEN, lay_fleet, same

if TYPE_CHECKING:
    from pathlib import Path

    from merge_gate.records.report import Report
    from tests.support.models import Shelf

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


@pytest.fixture(scope="module")
def first(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    place = tmp_path_factory.mktemp("first")
    lay_fleet(shelf, place)
    (place / "gate.yml").write_text(GATE)
    report = judged(place)
    assert {one.name for one in report.adapters if one.cause} == set(BROKEN)
    return place, report


@pytest.mark.slow
@pytest.mark.parametrize("threads", ["1", "2", "3"])
def test_the_number_of_threads_changes_nothing(first: tuple[Path, Report], threads: str) -> None:
    place, report = first
    assert same(judged(place, OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads)) == same(report)


@pytest.mark.slow
def test_neither_does_the_order_of_the_disk(first: tuple[Path, Report], tmp_path: Path) -> None:
    """Files that were made in the opposite order are listed in another by most file systems."""
    place, report = first
    for path in sorted(place.rglob("*"), reverse=True):
        if path.is_file() and "merge-gate-report" not in path.parts:
            target = tmp_path / path.relative_to(place)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    assert same(judged(tmp_path)) == same(report)
