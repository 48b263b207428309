"""The gate knows its own files by their tag alone, marks and moves them, and never touches another file."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from merge_gate._internal import earlier_reports
from merge_gate._internal.earlier_reports import is_own, mark_stale
from merge_gate._internal.errors import GateError, UsageError
from merge_gate._internal.output_files import TAG_WITHIN_BYTES
from merge_gate.records.terms import Result
from merge_gate.report.formats.json_report import read
from merge_gate.report.stored.report_files import FORMATS, write_report, write_text
from tests.support.reports import EMPTY, FAIL, PASS

if TYPE_CHECKING:
    from collections.abc import Callable

    from merge_gate.records.report import Report

OWN = FORMATS["report.json"](PASS)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def texts(report: Report) -> set[bytes]:
    return {render(report).encode() for render in FORMATS.values()}


# --- recognized ----------------------------------------------------------------------------------------------------


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


def unreadable(path: Path) -> None:
    path.symlink_to(path.name)  # root may read everything else


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
    "a link that cannot be followed": unreadable,
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
        mark_stale(tmp_path)
    assert "--output" in caught.value.hint
    assert before == sorted((str(path), os.lstat(path)[:3]) for path in tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=name):
        write_text(tmp_path / name, OWN)


# --- marked ---------------------------------------------------------------------------------------------------------


def test_nothing_to_move_makes_no_directory(tmp_path: Path) -> None:
    earlier = mark_stale(tmp_path)
    earlier.replace_previous()
    assert (earlier.place, earlier.line) == (None, "")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("earlier", [PASS, FAIL, EMPTY], ids=["pass", "fail", "provisional"])
def test_a_mistake_marks_the_report_and_loses_nothing(earlier: Report, tmp_path: Path) -> None:
    write_report(earlier, tmp_path)
    for _ in range(3):
        assert str(tmp_path / "report.json") in mark_stale(tmp_path).line
    stale = read((tmp_path / "report.json").read_bytes(), "report.json")
    was = earlier.result.value if earlier.complete else "incomplete"
    assert (stale.complete, stale.stale, stale.passed) == (False, was, False)
    assert FORMATS["report.json"](replace(stale, complete=earlier.complete, stale=None)) == FORMATS["report.json"](
        earlier
    )
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {"report.json"}
    assert len({*tmp_path.iterdir()}) == len(FORMATS)
    mark_stale(tmp_path).replace_previous()
    assert contents(tmp_path) == {f"previous/{name}": render(earlier).encode() for name, render in FORMATS.items()}


def test_a_report_without_the_field_is_marked_too(tmp_path: Path) -> None:
    """An earlier version of the gate wrote it."""
    (tmp_path / "report.json").write_text(OWN.replace('  "stale": null,\n', ""))
    mark_stale(tmp_path)
    stale = read((tmp_path / "report.json").read_bytes(), "report.json")
    assert (stale.complete, stale.stale, stale.result) == (False, "pass", Result.ERROR)
    mark_stale(tmp_path).replace_previous()
    assert contents(tmp_path) == {"previous/report.json": OWN.encode()}


def test_a_file_of_the_user_with_a_hidden_name_is_refused(tmp_path: Path) -> None:
    write_report(PASS, tmp_path)
    (tmp_path / ".summary.md.stale").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=r"\.summary\.md\.stale"):
        mark_stale(tmp_path)
    assert contents(tmp_path) == before


# --- moved ---------------------------------------------------------------------------------------------------------


def test_a_run_that_judges_replaces_the_previous_report(tmp_path: Path) -> None:
    for report in (PASS, FAIL):
        write_report(report, tmp_path)
        earlier = mark_stale(tmp_path)
        earlier.replace_previous()
        assert earlier.place == tmp_path / "previous"
    assert set(contents(tmp_path)) == {f"previous/{name}" for name in FORMATS}
    assert set(contents(tmp_path).values()) == texts(FAIL)


@pytest.mark.parametrize("mine", ["notes.txt", "junit.xml", "a directory", "a file", "a link"])
def test_a_place_with_a_file_of_the_user_is_left_alone(mine: str, tmp_path: Path) -> None:
    previous = tmp_path / "previous"
    if mine == "a file":
        previous.write_text("mine")
    elif mine == "a link":
        write_report(PASS, tmp_path / "elsewhere")
        previous.symlink_to("elsewhere")
    else:
        write_report(PASS, previous, formats=["report.json"])
        (previous / mine).mkdir() if mine == "a directory" else (previous / mine).write_text("mine")
    before = contents(tmp_path)
    for report in (PASS, FAIL, EMPTY):
        write_report(report, tmp_path)
        earlier = mark_stale(tmp_path)
        earlier.replace_previous()
        assert earlier.place == tmp_path / "previous-2"
    after = contents(tmp_path)
    assert before.items() <= after.items()
    assert {after[name] for name in after if name not in before} == texts(EMPTY)


def test_only_the_gates_own_unfinished_files_are_removed(tmp_path: Path) -> None:
    own = [".report.json.0123456789abcdef.tmp", ".summary.md.0123456789abcdef.tmp"]
    users = [".report.json.backup.tmp", ".notes.md.0123456789abcdef.tmp", "report.json.tmp", ".report.json.0123.tmp"]
    for name in own + users:
        (tmp_path / name).write_text("half")
    (tmp_path / ".junit.xml.0123456789abcdef.tmp").mkdir()
    mark_stale(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*users, ".junit.xml.0123456789abcdef.tmp"}


@pytest.mark.parametrize(
    "killed_at",
    [
        pytest.param(step, marks=pytest.mark.attempt(f"Y51-{step}", f"kill -9 at move {step} to previous/", "kept"))
        for step in range(len(FORMATS) + 1)
    ],
)
def test_a_kill_during_the_move_loses_no_report(
    killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(FAIL, tmp_path / "previous")
    write_report(PASS, tmp_path)
    earlier = mark_stale(tmp_path)
    moves, move = iter(range(killed_at)), Path.rename

    def rename(path: Path, target: Path) -> Path:
        if next(moves, None) is None:
            raise KeyboardInterrupt
        return move(path, target)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", rename)
        patched.setattr(earlier_reports, "_write_stale", killed)
        with pytest.raises(KeyboardInterrupt):
            earlier.replace_previous()
    mark_stale(tmp_path).replace_previous()
    left = [read(path.read_bytes(), path.name) for path in tmp_path.rglob("report.json")]
    assert "pass" in {report.stale or report.result.value for report in left}


def test_formats_without_their_report_replace_no_report(tmp_path: Path) -> None:
    write_report(PASS, tmp_path / "previous")
    write_report(FAIL, tmp_path)
    (tmp_path / "report.json").unlink()
    mark_stale(tmp_path).replace_previous()
    assert (tmp_path / "previous" / "report.json").read_text() == OWN


@pytest.mark.parametrize("broken", ["mkdir", "unlink"])
def test_a_report_that_cannot_be_moved_stays(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(FAIL, tmp_path)
    if broken == "unlink":
        write_report(PASS, tmp_path / "previous")
    earlier = mark_stale(tmp_path)
    before = contents(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(GateError, match="No space left"):
        earlier.replace_previous()
    assert contents(tmp_path) == before
