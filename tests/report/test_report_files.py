"""Reports on disk: whole or not at all, never through a link, and a sentence where the directory is no good."""

from __future__ import annotations

import errno
import json
import os
import stat
from types import MappingProxyType
from typing import TYPE_CHECKING

import pytest

from merge_gate._internal.errors import ExitCode, GateError, UsageError
from merge_gate._internal.output_files import OUTPUT_FILES, TAG_WITHIN_BYTES
from merge_gate.report.stored import report_files
from merge_gate.report.stored.report_files import FORMATS, write_report
from merge_gate.report.wording import run_result
from tests.support.reports import EMPTY, FAIL, PASS, UNDECIDED
from tests.support.wording import Wording

if TYPE_CHECKING:
    from pathlib import Path

    from merge_gate._internal.output_files import OutputFile
    from merge_gate.records.report import Report


def test_writes_every_format_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "merge-gate-report"
    assert write_report(FAIL, folder) == tuple(folder / name for name in FORMATS)
    assert {path.name for path in folder.iterdir()} == set(FORMATS)
    assert json.loads((folder / "report.json").read_text("utf-8"))["result"] == "fail"
    assert (folder / "summary.md").read_text("utf-8").startswith("<!-- generator: merge-gate -->\n\n## ❌")


@pytest.mark.parametrize("run", [PASS, FAIL, UNDECIDED, EMPTY], ids=["pass", "fail", "undecided", "empty"])
@pytest.mark.parametrize("row", OUTPUT_FILES, ids=lambda row: row.name)
def test_every_file_names_its_generator_at_its_beginning(row: OutputFile, run: Report) -> None:
    text = FORMATS[row.name](run).encode()
    assert row.tag.match(text[:TAG_WITHIN_BYTES])
    assert row.tag.match(text.replace(b"\n", b"\r\n")[:TAG_WITHIN_BYTES]), "as git may check it out"
    assert not row.tag.match(b"notes\n" + text), "words further down are no tag"
    assert not row.tag.match(text.replace(b"merge-gate", b"merge-gates"))


def test_a_later_run_replaces_an_earlier_one(tmp_path: Path) -> None:
    write_report(PASS, tmp_path)
    write_report(EMPTY, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["complete"] is False
    assert run_result.headline(EMPTY) in (tmp_path / "summary.md").read_text("utf-8")


def test_only_the_formats_asked_for(tmp_path: Path) -> None:
    write_report(PASS, tmp_path, formats=["report.json"])
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_renderer_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(PASS, tmp_path)
    old = (tmp_path / "summary.md").read_bytes()

    def fail(_: object) -> str:
        raise RuntimeError("a bug")

    monkeypatch.setattr(report_files, "FORMATS", MappingProxyType({**FORMATS, "summary.md": fail}))
    with pytest.raises(RuntimeError, match="a bug"):
        write_report(FAIL, tmp_path)
    assert (tmp_path / "summary.md").read_bytes() == old
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["result"] == "fail", "what came before it stands"
    assert {path.name for path in tmp_path.iterdir()} == set(FORMATS)


@pytest.mark.parametrize("call", ["fsync", "fdopen"])
def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, wording: Wording
) -> None:
    write_report(PASS, tmp_path)
    old = (tmp_path / "report.json").read_bytes()

    original = getattr(os, call)

    def fail(descriptor: int, mode: str = "", *more: object) -> object:
        if mode == "rb":  # it reads what is there before it writes
            return original(descriptor, mode, *more)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(GateError) as caught:
        write_report(FAIL, tmp_path)
    wording(caught.value)
    assert caught.value.exit_code is ExitCode.ERROR
    assert (tmp_path / "report.json").read_bytes() == old
    assert {path.name for path in tmp_path.iterdir()} == set(FORMATS)


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    write_report(PASS, tmp_path)
    old = (tmp_path / "report.json").read_bytes()
    child = os.fork()
    if child == 0:
        os.fsync = lambda _: os._exit(9)
        write_report(FAIL, tmp_path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (tmp_path / "report.json").read_bytes() == old
    write_report(FAIL, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["result"] == "fail"


def test_does_not_write_through_a_link(tmp_path: Path, wording: Wording) -> None:
    secret = tmp_path / "secret"
    secret.write_text("keep")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "report.json").symlink_to(secret)
    with pytest.raises(UsageError) as caught:
        write_report(PASS, folder)
    wording(caught.value)
    assert secret.read_text() == "keep"


def test_the_directory_must_not_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    with pytest.raises(UsageError) as caught:
        write_report(PASS, tmp_path / "out")
    assert "real" in caught.value.hint
    assert not list((tmp_path / "real").iterdir())


@pytest.mark.parametrize("below", [".", "sub"])
def test_a_file_is_no_directory(tmp_path: Path, below: str, wording: Wording) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UsageError, match="out") as caught:
        write_report(PASS, tmp_path / "out" / below)
    assert "--output" in caught.value.hint
    wording(caught.value)


def test_a_directory_in_the_file_s_place(tmp_path: Path, wording: Wording) -> None:
    (tmp_path / "report.json").mkdir()
    with pytest.raises(UsageError) as caught:
        write_report(PASS, tmp_path)
    wording(caught.value)


def test_a_directory_that_one_may_not_write_to(tmp_path: Path, wording: Wording) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(UsageError) as caught:
            write_report(PASS, locked / "out")
        wording(caught.value)
        with pytest.raises(UsageError) as caught:
            write_report(PASS, locked)
        wording(caught.value)
    finally:
        os.seteuid(user)


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_report(PASS, tmp_path)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "report.json").stat().st_mode) == 0o640
