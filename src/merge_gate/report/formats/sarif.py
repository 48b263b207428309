"""Renders report.sarif for code scanning and editors: SARIF 2.1.0, one run.

The rules are the table of checks. A result is one kind of finding of an adapter, in all dtypes that have it. It points
at the adapter's entry in the configuration file, or without one at the adapter's own config.

Errors come first. Fingerprints contain no line, so an alert stays the same when the file is edited above it.
"""

from __future__ import annotations

import hashlib
import json
import math
import posixpath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.kinds import ANSWERS, WITHOUT_SETTING, FindingKind
from merge_gate.records.config import COMMAND_LINE
from merge_gate.records.files import CONFIG_NAME
from merge_gate.records.project import PROJECT_URL
from merge_gate.records.report import AdapterReport
from merge_gate.records.terms import Result, Severity
from merge_gate.report.wording import run_result, words
from merge_gate.report.wording.alike import more_findings, unique_findings
from merge_gate.report.wording.explanations import page_of
from merge_gate.report.wording.untrusted import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from merge_gate.judging.checks.check import Check
    from merge_gate.records.report import BaseReport, Report
    from merge_gate.records.terms import BaseKey, Finding

MAX_RESULTS = 5_000
"""GitHub keeps at most this many results of a run."""

_ROWS: dict[str, Check | FindingKind] = {**CHECKS, **WITHOUT_SETTING}
_SUMMARIES = {check: row.summary for check, row in _ROWS.items()}
_LEVELS = [str(level) for level in (Severity.ERROR, Severity.WARNING, Severity.NOTE)]
_EXIT_CODES = {Result.PASS: 0, Result.FAIL: 1, Result.ERROR: 3}

Json = dict[str, Any]


def render(report: Report) -> str:
    """Return the JSON of report.sarif."""
    results = sorted(_results(report), key=lambda result: _LEVELS.index(result["level"]))
    run = {
        "tool": {"driver": _driver(report)},
        "invocations": [_invocation(report, left_out=max(len(results) - MAX_RESULTS, 0))],
        "originalUriBaseIds": {"%SRCROOT%": {"description": {"text": "The root of the checkout."}}},
        "columnKind": "unicodeCodePoints",
        "results": results[:MAX_RESULTS],
        **_marks(report),
    }
    document = {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}
    # A GitHub runner obeys `##[` anywhere in a line, also if a step prints this file. To JSON, the escape is the same.
    return json.dumps(document, indent=1, allow_nan=False).replace("##[", "#\\u0023[") + "\n"


def _driver(report: Report) -> Json:
    return {
        "name": "merge-gate",
        # Semantic versioning has no `1.0.0.dev0`: the part after the numbers follows a hyphen.
        "semanticVersion": one_line(report.tool.version, words.NAME_LENGTH).replace(".dev", "-dev."),
        **({"informationUri": PROJECT_URL} if PROJECT_URL else {}),
        "rules": [_rule(check, summary) for check, summary in _summaries(report).items()],
    }


def _summaries(report: Report) -> dict[str, str]:
    """The rules. What a finished model can be is a rule only in a report that compared one."""
    return _SUMMARIES | ({answer.id: answer.summary for answer in ANSWERS.values()} if report.is_comparison else {})


def _rule(check: str, summary: str) -> Json:
    row = _ROWS.get(check)
    address = page_of(check)
    return {
        "id": check,
        **({"helpUri": address} if address else {}),
        "shortDescription": {"text": summary},
        "fullDescription": {"text": summary},
        "help": {
            "text": f"{summary} What it means and what to do: merge-gate explain {check}",
            "markdown": f"{summary} What it means and what to do: `merge-gate explain {check}`",
        },
        "defaultConfiguration": {"level": str(row.severity if row else Severity.ERROR)},
    }


def _invocation(report: Report, *, left_out: int) -> Json:
    notifications = []
    if not report.complete:
        notifications.append({"level": "error", "message": {"text": run_result.advice(report)}})
    notifications += [{"level": "error", "message": {"text": _plain(problem)}} for problem in words.problems(report)]
    if left_out:
        more = f"{words.counted(left_out, 'more result')} left out; report.json has all findings."
        notifications.append({"level": "warning", "message": {"text": more}})
    return {
        "executionSuccessful": report.complete and report.result is not Result.ERROR,
        "exitCode": _EXIT_CODES[report.result],
        "exitCodeDescription": run_result.verdict_line(report),
        **({"toolExecutionNotifications": notifications} if notifications else {}),
    }


def _marks(report: Report) -> Json:
    """The marks of verdicts, also of adapters that passed and have no result, and the baseline's sentences."""
    marks = [
        {"adapter": one_line(adapter.name, words.NAME_LENGTH), "dtype": words.precision(adapter.base), "mark": mark}
        for adapter in report.adapters
        for mark in words.marks(adapter)
    ]
    baseline = words.baseline(report)
    properties = {**({"marks": marks[:MAX_RESULTS]} if marks else {}), **({"baseline": baseline} if baseline else {})}
    return {"properties": properties} if properties else {}


# --- results -------------------------------------------------------------------------------------------------------


def _results(report: Report) -> Iterator[Json]:
    in_all_dtypes = words.by(
        words.worst_first(report.adapters),
        lambda adapter: (adapter.name, adapter.source, adapter.line, adapter.base.model),
    )
    for same in in_all_dtypes.values():
        for finding, more, where in unique_findings(same, lambda adapter: list(adapter.findings)):
            yield _result(report, same[0], finding, more, where or words.precisions(same))
    for bases in words.bases_with_findings(report.bases):
        for finding, more in words.grouped(bases[0].findings):
            yield _result(report, bases[0], finding, more, words.base_precisions(bases))


def _result(
    report: Report, judged: AdapterReport | BaseReport, finding: Finding, more: tuple[Finding, ...], dtypes: str
) -> Json:
    name, base = _identity(judged)
    marks = words.marks(judged) if isinstance(judged, AdapterReport) else []
    failure = words.failure(judged) if isinstance(judged, AdapterReport) else None
    check = one_line(finding.check, words.NAME_LENGTH)
    result: Json = {
        "ruleId": check,
        "level": str(finding.severity),
        "message": {"text": _message(name, dtypes, finding, more)},
        "locations": [
            {
                "physicalLocation": _location(report, judged),
                "logicalLocations": [{"fullyQualifiedName": words.place(finding) or name, "kind": "module"}],
            }
        ],
        "partialFingerprints": {"mergeGate/v1": _fingerprint(name, base, dtypes, finding)},
        "properties": {
            "model" if report.is_comparison else "adapter": name,
            "base": words.model_name(base),
            "dtype": dtypes,
            "origin": str(finding.origin),
            **({"failure": str(failure)} if failure else {}),
            **({"marks": marks} if marks else {}),
            "measured": {one_line(key, 80): value for key, value in finding.measured if math.isfinite(value)},
        },
    }
    if isinstance(judged, AdapterReport) and judged.accepted is not None and finding.severity is Severity.ERROR:
        reason = one_line(judged.accepted.reason, words.MESSAGE_LENGTH)
        result["suppressions"] = [{"kind": "external", "status": "accepted", "justification": reason}]
    if check in (rules := list(_summaries(report))):
        result["ruleIndex"] = rules.index(check)
    return result


def _identity(judged: AdapterReport | BaseReport) -> tuple[str, BaseKey]:
    if isinstance(judged, AdapterReport):
        return one_line(judged.name, words.NAME_LENGTH), judged.base
    return f"base {words.model_name(judged.key)}", judged.key


def _location(report: Report, judged: AdapterReport | BaseReport) -> Json:
    """The adapter's entry in the configuration. A base has no entry, so it points at the top of the file.

    Without a configuration, the location is the own config of the adapter or base, without a line: code scanning
    refuses results without a file. The config of a Hub id is not in the checkout.
    """
    config_path = report.config.path
    if config_path != COMMAND_LINE:
        line, column = (judged.line, judged.column) if isinstance(judged, AdapterReport) else (1, 1)
        region = {"startLine": max(line, 1), "startColumn": max(column, 1)}
        return {"artifactLocation": _address(config_path), "region": region}
    if isinstance(judged, AdapterReport):
        own = f"{judged.source}/{'config.json' if report.is_comparison else CONFIG_NAME}"
    else:
        own = f"{judged.model}/config.json"
    address = _address(own)
    return {"artifactLocation": {"uri": address["uri"]} if judged.revision else address}


def _message(name: str, dtypes: str, finding: Finding, more: tuple[Finding, ...]) -> str:
    text = f"{name} ({dtypes}): {one_line(finding.message, words.MESSAGE_LENGTH)}"
    if more:
        text += f"; and {more_findings(more)}"
    if finding.hint:
        text += f". To do: {one_line(finding.hint, words.MESSAGE_LENGTH)}"
    return _plain(text)


def _plain(text: str) -> str:
    """Escape brackets, which make links in a SARIF message (section 3.11.6)."""
    return text.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]")


def _address(path: str) -> Json:
    """The address of a path: relative to the checkout for code scanning, or else absolute."""
    normal = posixpath.normpath(quote(path.encode("utf-8", "backslashreplace"), safe="/"))
    if normal.startswith("/"):
        return {"uri": f"file://{normal}"}
    return {"uri": normal, "uriBaseId": "%SRCROOT%"}


def _fingerprint(name: str, base: BaseKey, dtypes: str, finding: Finding) -> str:
    parts = [name, base.model or "", dtypes, finding.check]
    parts += [finding.module or "", finding.tensor or ""]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
