"""What lies where artifacts were downloaded: found in whatever way it lies, and nothing but regular files is read."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from merge_gate.errors import UsageError
from merge_gate.output_files import OUTPUT_FILES
from merge_gate.report.formats.json_report import render
from merge_gate.report.stored import report_files
from merge_gate.shards import shard_files
from merge_gate.shards.shard_files import found_in, refuse_overwriting
from tests.support.shards.shard_reports import SHARDS
from tests.support.wording import Wording

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    for number, one in enumerate(SHARDS, 1):
        (tmp_path / f"shard-{number}").mkdir()
        (tmp_path / f"shard-{number}" / "report.json").write_text(render(one), encoding="utf-8")
        (tmp_path / f"shard-{number}" / "summary.md").write_text("", encoding="utf-8")
    return tmp_path


def problems(*directories: Path) -> list[str]:
    return [one.problem for one in found_in([str(directory) for directory in directories]) if one.problem]


def test_a_directory_of_artifacts_and_each_by_name_are_the_same(downloads: Path) -> None:
    below = found_in([str(downloads)])
    assert [one.report for one in below] == list(SHARDS)
    assert found_in([str(downloads / f"shard-{number}") for number in (1, 2, 3)]) == below
    assert found_in([str(downloads), str(downloads / "shard-2")]) == below, "named twice is not there twice"


def test_what_is_not_there_is_named(downloads: Path, wording: Wording) -> None:
    (downloads / "empty").mkdir()
    for place in (downloads, downloads / "empty", downloads / "none"):
        wording(*problems(place))


def test_hostile_content_is_neither_followed_nor_waited_for(
    downloads: Path, monkeypatch: pytest.MonkeyPatch, wording: Wording
) -> None:
    evil = [downloads / name for name in ("big", "dir", "json", "link", "pipe")]
    for one in evil:
        one.mkdir()
    (downloads / "zlink").symlink_to(downloads / "shard-1")
    (downloads / "dir" / "report.json").mkdir()
    (downloads / "json" / "report.json").write_text('{"a": 1, "a": 2}')
    (downloads / "link" / "report.json").symlink_to(downloads / "shard-1" / "report.json")
    os.mkfifo(downloads / "pipe" / "report.json")
    monkeypatch.setattr(
        report_files, "OUTPUT_FILES", (OUTPUT_FILES[0]._replace(limit_bytes=100_000), *OUTPUT_FILES[1:])
    )
    (downloads / "big" / "report.json").write_bytes(b" " * 100_001)
    for place, problem in zip([downloads / "zlink", *evil], problems(downloads), strict=True):
        wording(f"{place.name} {problem}")
    assert problems(downloads / "zlink")
    monkeypatch.setattr(shard_files, "MOST_DIRECTORIES", 2)
    wording(*problems(downloads)[1:2])


def test_a_shard_is_not_written_over(downloads: Path, wording: Wording) -> None:
    files = found_in([str(downloads)])
    refuse_overwriting(files, str(downloads / "combined"))
    with pytest.raises(UsageError) as raised:
        refuse_overwriting(files, str(downloads / "shard-1"))
    wording(raised.value)
