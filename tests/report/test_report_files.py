"""Reports on disk: whole or not at all, never through a link, in a directory of one run at a time, and documented."""

import json
import os
import re
import resource
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from merge_gate._internal.errors import ExitCode, GateError, UsageError
from merge_gate._internal.output_files import OUTPUT_FILES, TAG_WITHIN_BYTES, OutputFile
from merge_gate.records.measured import TensorMerge
from merge_gate.records.report import AdapterReport, BaseReport, Report
from merge_gate.records.terms import Finding
from merge_gate.report.stored.output_directory import begun_run
from merge_gate.report.stored.report_files import FORMATS, write_report
from tests.support.field_tables import column_table, field_table, held_table
from tests.support.reports import EMPTY, FAIL, PASS, UNDECIDED
from tests.support.wording import Wording


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
        for place in (locked / "out", locked):
            with pytest.raises(UsageError) as caught:
                write_report(PASS, place)
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


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond a kilobyte."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, request: pytest.FixtureRequest, wording: Wording) -> None:
    write_report(PASS, tmp_path)
    request.getfixturevalue("full_disk")
    with pytest.raises(GateError) as caught:
        write_report(FAIL, tmp_path)
    wording(caught.value)
    assert caught.value.exit_code is ExitCode.ERROR
    assert (tmp_path / "report.json").read_text("utf-8") == FORMATS["report.json"](PASS)
    assert {path.name for path in tmp_path.iterdir()} == set(FORMATS)


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


def test_a_link_is_not_followed(tmp_path: Path, wording: Wording) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "report.json").write_text("old")
    (tmp_path / "out").symlink_to("elsewhere")
    with pytest.raises(UsageError) as caught, begun_run(str(tmp_path / "out")):
        pass
    wording(caught.value)
    assert (tmp_path / "elsewhere" / "report.json").exists()


DOCS = (Path(__file__).parents[2] / "docs" / "reference/report.md").read_text(encoding="utf-8")
SECTIONS = dict(zip(*[iter(re.split(r"^#+ (.*)$", DOCS, flags=re.MULTILINE)[1:])] * 2, strict=True))


def file_table() -> str:
    """The formats, as docs/reference/report.md has them."""
    rows = [f"| `{one.name}` | `{one.word}` | {one.readers} | {one.content} |" for one in OUTPUT_FILES]
    return "\n".join(["| file | `--format` | for | what it is |", "|---|---|---|---|", *rows])


@pytest.mark.parametrize(
    ("block", "table"),
    [
        ("files of a run", file_table()),
        ("fields of Report", field_table(Report)),
        ("fields of BaseReport", field_table(BaseReport)),
        ("fields of AdapterReport", field_table(AdapterReport)),
        ("fields of Finding", field_table(Finding)),
        ("columns of TensorMerge", column_table(TensorMerge)),
    ],
)
def test_the_tables_of_fields_are_what_the_records_say(block: str, table: str) -> None:
    held_table("reference/report.md", block, table)


def test_every_file_is_documented() -> None:
    assert set(re.findall(r"^\| `([\w.]+)` \|", SECTIONS["Reading the report"], re.MULTILINE)) == set(FORMATS)


def test_the_example_program_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    program = program.replace('json.load(open("merge-gate-report/report.json", encoding="utf-8"))', "REPORT")
    assert "REPORT" in program
    write_report(FAIL, tmp_path)
    with pytest.raises(SystemExit) as ended:
        exec(program, {"REPORT": json.loads((tmp_path / "report.json").read_text("utf-8"))})
    assert ended.value.code == 1
    assert capsys.readouterr().out.splitlines()[0] == "billing bfloat16 failed adapter-nonfinite"
    write_report(PASS, tmp_path)
    exec(program, {"REPORT": json.loads((tmp_path / "report.json").read_text("utf-8"))})
