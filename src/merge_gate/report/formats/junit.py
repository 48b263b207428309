"""Renders junit.xml for programs that show test results (GitLab, Jenkins, Azure, actions on GitHub).

The XML follows Jenkins' junit-10 schema: a suite per base, a case per adapter and dtype. A failed adapter is a
`failure`. An adapter that could not be judged is an `error`, and so is a run that did not finish or judged nothing:
readers show a file without cases as green.

A shard without adapters is one case that passed, because some readers refuse a file without cases.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from merge_gate._internal.output_files import GENERATOR_COMMENT
from merge_gate.records.terms import FailureKind, Verdict
from merge_gate.report.wording import run_result, words
from merge_gate.report.wording.alike import earlier_entries, more_findings
from merge_gate.report.wording.untrusted import one_line, safe_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from merge_gate.records.report import AdapterReport, Report
    from merge_gate.records.terms import Finding

_TAGS = {Verdict.FAILED: "failure", Verdict.ERROR: "error"}
_MAX_GROUPS = 30


def render(report: Report) -> str:
    """Return the XML of junit.xml."""
    is_whole = report.complete and not report.problems and bool(report.adapters)
    no_verdict = not is_whole and not (report.complete and report.is_empty_shard)
    own = (no_verdict or not report.adapters, no_verdict)
    root = ET.Element("testsuites", {"name": "merge-gate", **_counts(report.adapters, *own)})
    for name, adapters in words.by(report.adapters, _suite).items():
        suite = ET.SubElement(root, "testsuite", {"name": name, "skipped": "0", **_counts(adapters)})
        properties = ET.SubElement(suite, "properties")
        for key, value in _properties(report, adapters[0]):
            ET.SubElement(properties, "property", name=key, value=one_line(value, words.NAME_LENGTH))
        for adapter, before in zip(adapters, earlier_entries(adapters), strict=True):
            _case(suite, name, adapter, before)
    if no_verdict or not report.adapters:
        suite = ET.SubElement(root, "testsuite", {"name": "merge-gate", "skipped": "0", **_counts((), *own)})
        case = ET.SubElement(suite, "testcase", name="run", classname="merge-gate", time="0")
        _run(case, report, no_verdict=no_verdict)
    ET.indent(root)
    # A GitHub runner obeys `##[` anywhere in a line, also when a step prints this file. To XML, the entity is the same.
    text = ET.tostring(root, encoding="unicode").replace("##[", "#&#35;[")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{GENERATOR_COMMENT}\n{text}\n'


def _run(case: ET.Element, report: Report, *, no_verdict: bool) -> None:
    """Add the run itself as a case, for problems that belong to no adapter."""
    why = safe_text("\n".join([run_result.advice(report), *words.problems(report)]))
    if no_verdict:
        ET.SubElement(case, "error", type="run", message=run_result.headline(report)).text = why
    else:
        ET.SubElement(case, "system-out").text = f"{run_result.headline(report)}\n{why}"


def _suite(adapter: AdapterReport) -> str:
    revision = f" at {one_line(adapter.base.revision, words.NAME_LENGTH)}" if adapter.base.revision else ""
    return f"base {words.model_name(adapter.base)}{revision}"


def _counts(adapters: Sequence[AdapterReport], more_tests: int = 0, more_errors: int = 0) -> dict[str, str]:
    verdicts = [adapter.verdict for adapter in adapters]
    return {
        "tests": str(len(verdicts) + more_tests),
        "failures": str(verdicts.count(Verdict.FAILED)),
        "errors": str(verdicts.count(Verdict.ERROR) + more_errors),
        "time": _time(sum(adapter.seconds for adapter in adapters if math.isfinite(adapter.seconds))),
    }


def _time(seconds: float) -> str:
    return f"{abs(seconds):.3f}" if 0 <= seconds < math.inf else "0"


def _properties(report: Report, first: AdapterReport) -> list[tuple[str, str]]:
    properties = [("config", report.config.path), ("config-sha256", report.config.sha256)]
    for base in report.bases:
        if base.key.is_same_model(first.base) and base.sha256:
            properties.append(("base-sha256", base.sha256))
            break
    properties += [("judged", sentence)] if (sentence := words.judged(report)) else []
    properties += [("baseline", sentence) for sentence in words.baseline(report)]
    return [*properties, ("versions", ", ".join(words.versions(report.environment, report.tool.version)))]


def _name(adapter: AdapterReport) -> str:
    return f"{one_line(adapter.name, words.NAME_LENGTH)} ({words.precision(adapter.base)})"


def _case(suite: ET.Element, classname: str, adapter: AdapterReport, before: Mapping[Finding, AdapterReport]) -> None:
    """Add a case. `before` maps a finding to the earlier entry, of the same adapter in another dtype, that has it."""
    name = _name(adapter)
    case = ET.SubElement(suite, "testcase", name=name, classname=classname, time=_time(adapter.seconds))
    finding = words.deciding(adapter)
    if adapter.verdict is not Verdict.PASSED:
        message = one_line(finding.message, words.MESSAGE_LENGTH) if finding else "no finding was recorded"
        kind = words.failure(adapter)
        if kind is not None and kind is not FailureKind.BROKEN:
            message = f"{words.FAILURES[kind]}: {message}"
        element = ET.SubElement(case, _TAGS[adapter.verdict], type=words.cause(adapter), message=message)
        element.text = _text([*([finding] if finding else []), *words.others(adapter)], before, decided_by=finding)
    has_warnings = adapter.findings and adapter.verdict is Verdict.PASSED
    output = [_text(list(adapter.findings), before)] if has_warnings else []
    output += words.marks(adapter)
    if output:
        ET.SubElement(case, "system-out").text = "\n\n".join(output)


def _text(
    findings: list[Finding], before: Mapping[Finding, AdapterReport], *, decided_by: Finding | None = None
) -> str:
    """Every kind of finding, the deciding one first: what is wrong, where, what to do, and where to read more."""
    groups = words.grouped(findings)
    parts = [
        f"{_kind(finding)}: the same as for {_name(before[finding])}"
        if finding in before
        else _part(finding, more, is_deciding=finding is decided_by)
        for finding, more in groups[:_MAX_GROUPS]
    ]
    if len(groups) > _MAX_GROUPS:
        rest = words.counted(len(groups) - _MAX_GROUPS, "more kind", "more kinds")
        parts.append(f"and {rest} of finding, in report.json")
    return safe_text("\n\n".join(parts))


def _kind(finding: Finding) -> str:
    return f"{words.level(finding)} {one_line(finding.check, words.NAME_LENGTH)}"


def _part(finding: Finding, more: tuple[Finding, ...], *, is_deciding: bool) -> str:
    lines = [
        f"{_kind(finding)}: {one_line(finding.message, words.MESSAGE_LENGTH)}",
        f"where: {'; '.join(filter(None, (words.place(finding), words.origin(finding))))}",
        f"found: {words.values(finding)}" if words.values(finding) else "",
        f"{words.hint_label(finding)}: {one_line(finding.hint, words.MESSAGE_LENGTH)}" if finding.hint else "",
        f"more: {words.more(finding)}" if is_deciding and words.more(finding) else "",
        f"and {more_findings(more)}" if more else "",
    ]
    return "\n".join(filter(None, lines))
