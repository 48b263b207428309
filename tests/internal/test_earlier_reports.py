"""The gate knows its own files by their tag alone, moves them when a run begins, and never touches another file."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from merge_gate._internal.earlier_reports import is_own, locked_for_run
from merge_gate._internal.errors import UsageError
from merge_gate._internal.output_files import TAG_WITHIN_BYTES
from merge_gate.records.report import Report
from merge_gate.report.stored.report_files import FORMATS, write_report, write_text
from merge_gate.report.stored.stored_report import stored
from tests.support.reports import EMPTY, FAIL, PASS

OWN = FORMATS["report.json"](PASS)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def set_of(report: Report, folder: str = "previous") -> dict[str, bytes]:
    return {f"{folder}/{name}": render(report).encode() for name, render in FORMATS.items()}


def begin(folder: Path) -> None:
    with locked_for_run(folder):
        pass


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("report", [PASS, FAIL, EMPTY], ids=["pass", "fail", "provisional"])
def test_a_file_of_the_gate_is_recognized_also_in_part(name: str, report: Report, tmp_path: Path) -> None:
    path = tmp_path / name
    text = FORMATS.get(name, FORMATS["report.json"])(report)
    path.write_text(text)
    assert is_own(path)
    path.write_bytes(text.encode()[:TAG_WITHIN_BYTES])
    assert is_own(path)


def test_a_file_under_another_name_is_not_the_gates(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(OWN)
    (tmp_path / "summary.md").write_text(OWN)
    assert not is_own(tmp_path / "mine.json")
    assert not is_own(tmp_path / "summary.md")


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def later(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


FOREIGN: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.touch(),
    "the words in the middle": later(f"My notes.\n{OWN}"),
    "the words behind a blank": later(f" {OWN}"),
    "another tool": later(OWN.replace('"name": "merge-gate"', '"name": "merge-gate-fork"')),
    "a list of the gate's reports": later(f"[{OWN}]"),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 64),
    "a terabyte": sparse,
    "a pipe": os.mkfifo,
    "a directory": lambda path: path.mkdir(),
    "a link to a report": lambda path: path.symlink_to("own/report.json"),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link that cannot be followed": lambda path: path.symlink_to(path.name),  # root may read everything else
    "braces without end": later(OWN.partition('"passed"')[0] + "{" * 9999),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("name", ["report.json", "junit.xml"])
def test_any_other_file_is_refused_and_nothing_moves(kind: str, name: str, tmp_path: Path) -> None:
    write_report(PASS, tmp_path)
    write_report(PASS, tmp_path / "own")
    (tmp_path / name).unlink()
    FOREIGN[kind](tmp_path / name)
    before = sorted((str(path), os.lstat(path)[:3]) for path in tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=name) as caught:
        begin(tmp_path)
    assert "--output" in caught.value.hint
    assert before == sorted((str(path), os.lstat(path)[:3]) for path in tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=name):
        write_text(tmp_path / name, OWN)


def test_nothing_to_move_makes_no_directory(tmp_path: Path) -> None:
    (tmp_path / "previous").write_text("mine")
    begin(tmp_path)
    assert contents(tmp_path) == {"previous": b"mine"}


def test_a_run_keeps_one_earlier_report(tmp_path: Path) -> None:
    """Also if that one lacks a format: `previous/` never mixes the files of two runs."""
    for report in (PASS, FAIL):
        write_report(report, tmp_path)
        begin(tmp_path)
        assert contents(tmp_path) == set_of(report)
    write_report(EMPTY, tmp_path, formats=["report.json"])
    begin(tmp_path)
    assert contents(tmp_path) == {"previous/report.json": FORMATS["report.json"](EMPTY).encode()}


def test_files_of_the_user_in_previous_stay(tmp_path: Path) -> None:
    write_report(PASS, tmp_path / "previous")
    (tmp_path / "previous" / "notes.txt").write_text("mine")
    write_report(FAIL, tmp_path)
    begin(tmp_path)
    assert contents(tmp_path) == {**set_of(FAIL), "previous/notes.txt": b"mine"}


@pytest.mark.parametrize("mine", ["junit.xml", "a directory", "a file", "a link"])
def test_what_is_in_the_way_of_the_earlier_report_is_refused(mine: str, tmp_path: Path) -> None:
    previous = tmp_path / "previous"
    if mine == "a file":
        previous.write_text("mine")
    elif mine == "a link":
        write_report(PASS, tmp_path / "elsewhere")
        previous.symlink_to("elsewhere")
    else:
        write_report(PASS, previous, formats=["report.json"])
        (previous / "junit.xml").mkdir() if mine == "a directory" else (previous / mine).write_text("mine")
    write_report(FAIL, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="previous") as caught:
        begin(tmp_path)
    assert "--output" in caught.value.hint
    assert contents(tmp_path) == before


def test_only_the_gates_own_unfinished_files_are_removed(tmp_path: Path) -> None:
    own = [".report.json.0123456789abcdef.tmp", ".summary.md.0123456789abcdef.tmp"]
    users = [".report.json.backup.tmp", ".notes.md.0123456789abcdef.tmp", "report.json.tmp", ".report.json.0123.tmp"]
    for name in own + users:
        (tmp_path / name).write_text("half")
    (tmp_path / ".junit.xml.0123456789abcdef.tmp").mkdir()
    begin(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*users, ".junit.xml.0123456789abcdef.tmp"}


@pytest.mark.parametrize(
    "killed_at",
    [
        pytest.param(step, marks=pytest.mark.attempt(f"Y51-{step}", f"kill -9 at move {step} to previous/", "kept"))
        for step in range(len(FORMATS) + 1)
    ],
)
def test_a_kill_during_the_move_loses_no_file(killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(FAIL, tmp_path / "previous")
    write_report(PASS, tmp_path)
    moves, move = iter(range(killed_at)), Path.rename

    def rename(path: Path, target: Path) -> Path:
        if next(moves, None) is None:
            raise KeyboardInterrupt
        return move(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt), locked_for_run(tmp_path):
            raise KeyboardInterrupt  # at its first report
    assert set(set_of(PASS).values()) <= set(contents(tmp_path).values())
    begin(tmp_path)
    assert contents(tmp_path) == set_of(PASS)


def test_formats_without_their_report_replace_no_report(tmp_path: Path) -> None:
    write_report(PASS, tmp_path / "previous")
    write_report(FAIL, tmp_path)
    (tmp_path / "report.json").unlink()
    begin(tmp_path)
    assert (tmp_path / "previous" / "report.json").read_text() == OWN


def test_reports_of_earlier_versions_are_moved_and_read(tmp_path: Path) -> None:
    """Report.json had the field `stale`."""
    old = OWN.replace('"result"', '"stale": null,\n  "result"', 1)
    (tmp_path / "report.json").write_text(old)
    begin(tmp_path)
    assert contents(tmp_path) == {"previous/report.json": old.encode()}
    assert stored(str(tmp_path / "previous")).passed
