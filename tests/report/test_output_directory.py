"""The output directory belongs to one run at a time, which moves the report of an earlier run."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from merge_gate._internal import locked_directory
from merge_gate._internal.errors import GateError, UsageError
from merge_gate.report.stored.output_directory import begun_run, explained
from merge_gate.report.stored.report_files import FORMATS, write_report
from tests.support.reports import PASS
from tests.support.wording import Wording


def test_an_earlier_report_is_moved_and_other_files_stay(tmp_path: Path) -> None:
    write_report(PASS, tmp_path)
    for name in (".report.json.0123456789abcdef.tmp", "notes.txt"):
        (tmp_path / name).write_text("old")
    with begun_run(str(tmp_path)):
        assert {file.name for file in tmp_path.iterdir()} == {"notes.txt", "previous"}
        assert {file.name for file in (tmp_path / "previous").iterdir()} == set(FORMATS)


def test_a_second_run_is_told_of_the_first_and_leaves_its_report(tmp_path: Path, wording: Wording) -> None:
    with begun_run(str(tmp_path)):
        write_report(PASS, tmp_path)
        with pytest.raises(UsageError) as caught, begun_run(str(tmp_path)):
            pass
        wording(caught.value)
        assert (tmp_path / "report.json").read_text() == FORMATS["report.json"](PASS)
    assert caught.value.hint
    with begun_run(str(tmp_path)):
        assert not (tmp_path / "report.json").exists()


def test_a_directory_of_which_nothing_came_is_taken_away_again(tmp_path: Path) -> None:
    with begun_run(str(tmp_path / "a" / "b")):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with begun_run(str(tmp_path / "a" / "b")):
        (tmp_path / "a" / "b" / "report.json").write_text("{}")
    assert (tmp_path / "a" / "b" / "report.json").exists()


def test_a_file_system_without_locks_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locked_directory.fcntl, "flock", refuse)
    write_report(PASS, tmp_path)
    with begun_run(str(tmp_path)):
        assert not (tmp_path / "report.json").exists()


def test_a_link_is_not_followed(tmp_path: Path, wording: Wording) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "report.json").write_text("old")
    (tmp_path / "out").symlink_to("elsewhere")
    with pytest.raises(UsageError) as caught, begun_run(str(tmp_path / "out")):
        pass
    wording(caught.value)
    assert (tmp_path / "elsewhere" / "report.json").exists()


def test_a_limit_on_file_sizes_is_the_disks_fault() -> None:
    with pytest.raises(GateError) as caught, explained("cannot write x"):
        raise OSError(27, "File too large")
    assert not isinstance(caught.value, UsageError)
