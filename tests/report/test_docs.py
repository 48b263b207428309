"""docs/reference/report.md says what the records say of every field, and names every file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from merge_gate._internal.output_files import OUTPUT_FILES
from merge_gate.records.measured import TensorMerge
from merge_gate.records.report import AdapterReport, BaseReport, Report
from merge_gate.records.terms import Finding
from merge_gate.report.stored.report_files import FORMATS, write_report
from tests.support.field_tables import column_table, field_table, held_table
from tests.support.reports import FAIL, PASS

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
