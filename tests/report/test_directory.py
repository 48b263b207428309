"""The output directory belongs to one run at a time, and holds nothing of an earlier one."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from merge_gate.errors import GateError, UsageError
from merge_gate.records.terms import Result
from merge_gate.report import directory
from merge_gate.report.directory import claimed, explained, written

NAMES = ("report.json", "summary.md")


def test_what_an_earlier_run_left_is_gone_and_other_files_stay(tmp_path: Path) -> None:
    for name in (*NAMES, ".report.json.0123456789abcdef.tmp", "notes.txt"):
        (tmp_path / name).write_text("old")
    with claimed(tmp_path, NAMES):
        assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_second_run_is_told_of_the_first_and_leaves_its_report_alone(tmp_path: Path) -> None:
    with claimed(tmp_path, NAMES):
        (tmp_path / "report.json").write_text("the first run's")
        with pytest.raises(UsageError, match="another run of merge-gate") as caught, claimed(tmp_path, NAMES):
            pass
        assert (tmp_path / "report.json").read_text() == "the first run's"
    assert caught.value.hint
    with claimed(tmp_path, NAMES):
        assert not (tmp_path / "report.json").exists()


def test_a_directory_of_which_nothing_came_is_taken_away_again(tmp_path: Path) -> None:
    with claimed(tmp_path / "a" / "b", NAMES):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with claimed(tmp_path / "a" / "b", NAMES):
        (tmp_path / "a" / "b" / "report.json").write_text("{}")
    assert (tmp_path / "a" / "b" / "report.json").exists()


def test_a_file_system_without_locks_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(directory.fcntl, "flock", refuse)
    (tmp_path / "report.json").write_text("old")
    with claimed(tmp_path, NAMES):
        assert not (tmp_path / "report.json").exists()


def test_a_directory_under_a_reports_name_is_somebodys_and_stays(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    with claimed(tmp_path, NAMES):
        assert (tmp_path / "report.json").is_dir()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "report.json").write_text("old")
    (tmp_path / "out").symlink_to("elsewhere")
    with pytest.raises(UsageError, match="symbolic link"), claimed(tmp_path / "out", NAMES):
        pass
    assert (tmp_path / "elsewhere" / "report.json").exists()


def test_a_limit_on_the_size_of_files_is_the_disks_fault_not_the_callers() -> None:
    with pytest.raises(GateError) as caught, explained("cannot write x"):
        raise OSError(27, "File too large")
    assert not isinstance(caught.value, UsageError)


@pytest.mark.parametrize("text", [None, "", "[]", "{", '{"complete": true}', '{"complete": true, "result": "maybe"}'])
def test_what_is_not_a_report_says_nothing(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    assert written(tmp_path) is None


def test_a_report_says_whether_it_is_complete(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"complete": false, "result": "error"}')
    assert written(tmp_path) == (False, Result.ERROR)
