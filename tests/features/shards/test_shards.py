"""A fleet in shards, by the real command: the combination is one machine's report but for times."""

import shutil
from pathlib import Path

import pytest

from merge_gate.features.shards.combined import combined, reports_in
from merge_gate.records.terms import Result
from merge_gate.report.stored.report_files import FORMATS
from tests.support.command import merge_gate
from tests.support.fleet_commands import stored
from tests.support.models import Shelf
from tests.support.small_fleet import BROKEN, same

COUNT = 3


@pytest.fixture(scope="module")
def parts(fleet: Path) -> Path:
    """The directory of the fleet, which was judged whole, and is now judged in shards."""
    for index in range(COUNT):
        name = f"shards/{index + 1}"
        answer = merge_gate(
            "run", "fleet.yml", "--shard", str(COUNT), "--output", name, cwd=fleet, JOB_COMPLETION_INDEX=str(index)
        )
        assert answer.code in {0, 1}, answer.said
    return fleet


@pytest.mark.slow
def test_three_machines_make_the_report_of_one(parts: Path) -> None:
    answer = merge_gate("report", "combine", "shards", "--output", "combined", cwd=parts)
    assert answer.code == 1, answer.said
    assert "of 16 merges)" in answer.out
    assert {path.name for path in (parts / "combined").iterdir()} == set(FORMATS)
    whole = stored(parts / "cold")
    assert same(stored(parts / "combined")) == same(whole)
    assert {one.name: one.cause for one in whole.adapters if one.cause} == BROKEN
    counts = [len(stored(parts / "shards" / str(index)).adapters) for index in range(1, COUNT + 1)]
    assert sum(counts) == 16
    assert min(counts) > 0


@pytest.mark.slow
def test_a_shard_that_is_missing_leaves_no_verdict(parts: Path, tmp_path: Path) -> None:
    healthy = [index for index in range(1, COUNT + 1) if stored(parts / "shards" / str(index)).result is Result.PASS]
    assert healthy
    for index in healthy:
        shutil.copytree(parts / "shards" / str(index), tmp_path / "some" / str(index))
    answer = merge_gate("report", "combine", "some", cwd=tmp_path)
    assert answer.code == 3, answer.said
    report = stored(tmp_path / "merge-gate-report")
    assert (report.result, report.complete) == (Result.ERROR, False)
    assert report.adapters
    assert report.problems
    assert all(problem in " ".join(answer.out.split()) for problem in report.problems)


@pytest.mark.slow
def test_more_shards_than_adapters(shelf: Shelf, tmp_path: Path) -> None:
    """Each job is green, and the combination counts: one of three has nothing to do."""
    for name in ("a", "b"):
        shutil.copytree(shelf.adapter("plain"), tmp_path / name)
    words = ["run", "a", "b", "--base", str(shelf.base("llama"))]
    for index in range(1, 4):
        answer = merge_gate(*words, "--shard", f"{index}/3", "--output", f"s/{index}", cwd=tmp_path)
        assert answer.code == 0, answer.said
    empty = [index for index in range(1, 4) if not stored(tmp_path / "s" / str(index)).adapters]
    assert len(empty) == 1
    assert combined(reports_in([str(tmp_path / "s")])).result is Result.PASS
    for index in set(range(1, 4)) - set(empty):
        shutil.rmtree(tmp_path / "s" / str(index))
    assert combined(reports_in([str(tmp_path / "s")])).result is Result.ERROR


@pytest.mark.slow
def test_an_output_that_is_an_input_is_refused(parts: Path) -> None:
    before = (parts / "shards" / "1" / "report.json").read_bytes()
    answer = merge_gate("report", "combine", "shards", "--output", "shards/1", cwd=parts)
    assert answer.code == 2, answer.said
    assert (parts / "shards" / "1" / "report.json").read_bytes() == before


def test_nothing_to_combine_is_an_error_and_not_green(tmp_path: Path) -> None:
    answer = merge_gate("report", "combine", "nowhere", cwd=tmp_path)
    assert answer.code == 3, answer.said
    assert "nowhere" in answer.err
