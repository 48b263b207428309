"""docs/report.md names every field, every file, every value and every exit code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from merge_gate.errors import ExitCode
from merge_gate.report.files import FORMATS, write_report
from merge_gate.report.json_report import report_schema
from tests.report.reports import FAIL, PASS

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCS = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
SECTIONS = dict(zip(*[iter(re.split(r"^#+ (.*)$", DOCS, flags=re.MULTILINE)[1:])] * 2, strict=True))
CODES = {heading: set(re.findall(r"`([^`\n]+)`", text)) for heading, text in SECTIONS.items()}


def _within(schema: Any) -> Iterator[str]:
    """Names of properties and values of enumerations, at any depth that no reference leads to."""
    if isinstance(schema, dict):
        yield from schema.get("properties", {})
        yield from (value for value in schema.get("enum", ()) if value not in {"NaN", "Infinity", "-Infinity"})
        for key, value in schema.items():
            if key not in {"$defs", "if", "then"}:
                yield from _within(value)


@pytest.mark.parametrize(
    ("heading", "definition"),
    [("Fields of report.json", None), ("A base", "base"), ("An adapter", "adapter"), ("A finding", "finding")],
)
def test_every_field_and_value_is_documented(heading: str, definition: str | None) -> None:
    schema = report_schema()
    named = set(_within(schema["$defs"][definition] if definition else schema))
    known = CODES[heading] | (CODES["A base"] if definition == "adapter" else set())
    assert named - known == set()


def test_no_field_is_documented_that_is_not_there() -> None:
    schema = report_schema()
    names = set(_within(schema)) | {name for definition in schema["$defs"].values() for name in _within(definition)}
    for heading in ("Fields of report.json", "A base", "An adapter", "A finding"):
        for row in SECTIONS[heading].splitlines():
            if row.startswith("| `"):
                assert set(re.findall(r"`([^`]+)`", row.split("|")[1])) <= names


def test_every_file_is_documented() -> None:
    assert set(re.findall(r"^\| `([\w.]+)` \|", SECTIONS["Reading the report"], re.MULTILINE)) == set(FORMATS)


def test_the_exit_codes_are_the_tool_s() -> None:
    rows = re.findall(r"^\| (\d) \|", SECTIONS["Exit codes"], re.MULTILINE)
    assert [int(row) for row in rows] == sorted(ExitCode)


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
