"""The report as GitHub workflow commands: what stands at the configuration's lines in a pull request.

In: a `records.Report` and the workspace directory. Out: lines for standard output, escaped by the runner's rules
(actions/runner, ActionCommand.cs). A step may show 10 errors and 10 warnings; the tenth says how many are missing.
Also `fence`, which shuts the runner's ears to whatever a library prints. Knows neither files nor the other formats.
"""

from __future__ import annotations

import os
import re
import secrets
from typing import TYPE_CHECKING

from merge_gate.records import Severity, Verdict
from merge_gate.report import words
from merge_gate.report.untrusted import inert, one_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from merge_gate.records import AdapterReport, Finding, Report

SHOWN = 9
_TOKEN = re.compile(r"[A-Za-z0-9-]{16,}")


def render(report: Report, *, workspace: str | None = None) -> str:
    """Return the commands, one a line.

    `workspace` is GITHUB_WORKSPACE: annotations name the configuration relative to it, and no file where the
    configuration lies outside.
    """
    file = _relative(report.config_path, workspace)
    errors = [_verdict(adapter, file) for adapter in words.worst_first(report.adapters) if _blocked(adapter)]
    if not report.complete or not report.adapters:
        text = f"{words.headline(report)}. {words.advice(report)}"
        errors.insert(0, _command("error", _at(file, 1, 1), "merge-gate", text))
    warnings = [
        _warning(adapter, finding, more, file)
        for adapter in report.adapters
        for finding, more in words.grouped(words.warnings(adapter))
    ]
    return "".join(f"{line}\n" for line in [*_first("error", errors), *_first("warning", warnings)])


def fence(token: str | None = None) -> tuple[str, str]:
    """Return the pair of lines between which the runner obeys no workflow command.

    `token` must be unguessable for whoever writes between them; by default it is random.
    """
    token = token or secrets.token_hex(16)
    if not _TOKEN.fullmatch(token):
        raise ValueError("a fence's token must be at least 16 letters, digits or hyphens")
    return f"::stop-commands::{token}", f"::{token}::"


def _blocked(adapter: AdapterReport) -> bool:
    return adapter.verdict is not Verdict.PASSED


def _verdict(adapter: AdapterReport, file: str | None) -> str:
    finding = words.deciding(adapter)
    title = f"{one_line(adapter.name, 80)} {words.title(adapter)}" + (
        f": {words.cause(adapter)}" if adapter.verdict is Verdict.FAILED else ""
    )
    text = _sentences(finding) if finding else "No finding was recorded; the job's log may say more."
    return _command("error", _at(file, adapter.line, adapter.column), title, f"{text}\n({_on(adapter)})")


def _warning(adapter: AdapterReport, finding: Finding, more: int, file: str | None) -> str:
    title = f"{one_line(adapter.name, 80)}: {one_line(finding.check, 80)}"
    text = _sentences(finding) + (f"\nand {words.number(more)} more like it" if more else "") + f"\n({_on(adapter)})"
    return _command(Severity.WARNING, _at(file, adapter.line, adapter.column), title, text)


def _on(adapter: AdapterReport) -> str:
    return f"{one_line(adapter.source, 120)} on {words.model_name(adapter.base)}, {words.precision(adapter.base)}"


def _sentences(finding: Finding) -> str:
    lines = [one_line(finding.message, words.MESSAGE_LIMIT)]
    if place := words.place(finding):
        lines.append(f"Where: {place}")
    if finding.hint:
        lines.append(f"What to do: {one_line(finding.hint, words.MESSAGE_LIMIT)}")
    return "\n".join(lines)


def _first(level: str, commands: Sequence[str]) -> list[str]:
    left = len(commands) - SHOWN
    if left <= 0:
        return list(commands)
    more = _command(level, {}, "merge-gate", f"and {left} more; see the job summary or report.json")
    return [*commands[:SHOWN], more]


def _at(file: str | None, line: int, column: int) -> dict[str, str]:
    return {"file": file, "line": str(line), "col": str(column)} if file else {}


def _command(level: str, place: Mapping[str, str], title: str, text: str) -> str:
    properties = ",".join(f"{key}={_property(value)}" for key, value in {**place, "title": title}.items())
    return f"::{level} {properties}::{_data(text)}"


def _data(text: str) -> str:
    return inert(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _relative(path: str, workspace: str | None) -> str | None:
    """The path inside the workspace with forward slashes, or None where it lies outside."""
    if not path or not workspace:
        return None
    for resolved in (os.path.abspath, os.path.realpath):
        inside = os.path.relpath(resolved(path), resolved(workspace)).replace(os.sep, "/")
        if inside != ".." and not inside.startswith("../"):
            return one_line(inside)
    return None
