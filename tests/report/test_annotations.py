"""Workflow commands: as the runner reads them, at most ten of a level, and none that a name could add."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given

from merge_gate.records import Report, Verdict
from merge_gate.report.annotations import fence, render
from tests.report.reports import (
    CRASHED,
    EMPTY,
    FAIL,
    FAILED,
    PASSED,
    ROUNDING,
    WARNED,
    adapter,
    hostile_reports,
    report,
)

if TYPE_CHECKING:
    from pathlib import Path

COMMAND = re.compile(r"::(?P<name>error|warning) (?P<properties>[^:]*)::(?P<data>.*)")


@dataclasses.dataclass
class Command:
    name: str
    properties: dict[str, str]
    data: str


def obeyed(output: str) -> list[Command]:
    """What a runner makes of the output, by the rules of actions/runner's ActionCommand.TryParseV2."""
    commands = []
    for line in output.splitlines():
        match = COMMAND.fullmatch(line)
        assert match, line
        pairs = dict(pair.split("=", 1) for pair in match["properties"].split(","))
        commands.append(
            Command(match["name"], {key: _unescape(value) for key, value in pairs.items()}, _unescape(match["data"]))
        )
    return commands


def _unescape(text: str) -> str:
    for code, character in (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
        text = text.replace(code, character)
    return text


def test_a_failed_adapter_stands_at_its_line(tmp_path: Path) -> None:
    config = tmp_path / "sub" / "merge-gate.yml"
    run = report(FAILED, CRASHED, WARNED, config_path=str(config))
    failed, crashed, *warnings = obeyed(render(run, workspace=str(tmp_path)))
    assert failed.name == "error"
    assert failed.properties == {
        "file": "sub/merge-gate.yml", "line": "8", "col": "5", "title": "billing failed: adapter-nonfinite",
    }  # fmt: skip
    assert failed.data.startswith(FAILED.findings[1].message)
    assert f"What to do: {FAILED.findings[1].hint}" in failed.data
    assert crashed.properties["title"] == "translate-de could not be judged"
    assert [warning.properties["title"] for warning in warnings] == ["billing: rounding-loss", "legal: rounding-loss"]
    assert "81 %" in warnings[0].data


def test_a_config_outside_the_workspace_names_no_file(tmp_path: Path) -> None:
    run = report(FAILED, config_path=str(tmp_path / "c.yml"))
    (inside,) = [c for c in obeyed(render(run, workspace=str(tmp_path))) if c.name == "error"]
    (outside,) = [c for c in obeyed(render(run, workspace=str(tmp_path / "other"))) if c.name == "error"]
    (unknown,) = [c for c in obeyed(render(run)) if c.name == "error"]
    assert inside.properties["file"] == "c.yml"
    assert "file" not in outside.properties
    assert "file" not in unknown.properties


def test_a_workspace_behind_a_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    run = report(FAILED, config_path=str(tmp_path / "link" / "c.yml"))
    assert obeyed(render(run, workspace=str(tmp_path / "real")))[0].properties["file"] == "c.yml"


def test_at_most_ten_of_a_level() -> None:
    broken = [adapter(f"a{n}", Verdict.FAILED, cause="no-effect") for n in range(30)]
    warned = [adapter(f"w{n}", findings=(ROUNDING,) * 3) for n in range(12)]
    commands = obeyed(render(report(*broken, *warned)))
    errors = [command for command in commands if command.name == "error"]
    warnings = [command for command in commands if command.name == "warning"]
    assert (len(errors), len(warnings)) == (10, 10)
    assert errors[-1].data == "and 21 more; see the job summary or report.json"
    assert warnings[-1].data == "and 3 more; see the job summary or report.json"
    assert "and 2 more like it" in warnings[0].data


def test_a_run_without_a_verdict_is_an_error() -> None:
    assert "did not finish" in obeyed(render(EMPTY))[0].data
    assert "did not finish" in obeyed(render(report(PASSED, complete=False)))[0].data
    assert render(report(PASSED)) == ""


@given(hostile_reports())
def test_every_line_is_a_command_of_ours(run: Report) -> None:
    output = render(run, workspace=".")
    commands = obeyed(output)
    for command in commands:
        assert set(command.properties) <= {"file", "line", "col", "title"}
        assert command.properties["title"].isprintable()
    assert "##[" not in output
    assert len(output.splitlines()) <= 20
    blocked = any(judged.verdict is not Verdict.PASSED for judged in run.adapters)
    assert any(command.name == "error" for command in commands) == (blocked or not run.complete or not run.adapters)


def test_fence() -> None:
    opening, closing = fence()
    token = opening.removeprefix("::stop-commands::")
    assert closing == f"::{token}::"
    assert fence()[0] != opening
    assert fence("0123456789abcdef")[1] == "::0123456789abcdef::"
    for bad in ("short", "x" * 20 + "\n", "with space 0123456789"):
        with pytest.raises(ValueError, match="at least 16"):
            fence(bad)


def test_the_golden_run_is_readable() -> None:
    assert [command.name for command in obeyed(render(FAIL))] == ["error"] * 3 + ["warning"] * 2
