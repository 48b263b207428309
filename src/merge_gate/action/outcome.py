"""Compares the gate's exit code with its report, and decides the step's result.

The result is `pass` or `fail` only if the exit code and a complete, consistent report agree. Anything else is `error`.
The report comes out of a container, so it is not trusted.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate._internal.errors import ExitCode, GateError
from merge_gate._internal.regular_file import read_regular_file
from merge_gate._internal.strict_json import InvalidJsonError, parse_strictly
from merge_gate.action.docker import collect

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_KINDS: dict[str, Any] = {"schema_version": str, "complete": bool, "result": str, "counts": dict, "adapters": list}
_ADAPTER_KINDS: dict[str, Any] = {
    "name": str, "verdict": str, "cause": (str, type(None)), "findings": list, "line": int, "column": int,
}  # fmt: skip
_FINDING_KINDS: dict[str, Any] = {
    "check": str, "severity": str, "message": str, "hint": (str, type(None)), "tensor": (str, type(None)),
}  # fmt: skip
_MOST_MANIFEST_BYTES = 16 * 1024 * 1024
_VERDICTS = ("passed", "failed", "error")


@dataclass(frozen=True)
class StepOutcome:
    """The step's result. `problem` is the reason why there is no verdict; empty if there is one."""

    result: str
    report: Mapping[str, Any] | None = None
    problem: str = ""


def decide(code: int, path: Path, last_lines: Sequence[str] = (), refused: Sequence[str] = ()) -> StepOutcome:
    """Decide by the exit code and the report. `pass` and `fail` need both to agree, and a complete report.

    Args:
        code: the gate's exit code.
        path: the place of report.json.
        last_lines: the end of the gate's log. Without a report, it is the only explanation.
        refused: a sentence for each report file that was refused. If there is one, other code has written to the
            directory, so no file there counts as a verdict.
    """
    report, problem = (None, "wrote no report") if code == ExitCode.USAGE else read_report(path)
    if refused:
        return StepOutcome("error", report, "\n".join(["there is no verdict: the report was tampered with", *refused]))
    if report is None:
        lines = [f"the gate ended with exit code {code} and {problem}", *last_lines]
        return StepOutcome("error", problem="\n".join(lines))
    if report["complete"] and (code, report["result"]) in {(ExitCode.PASS, "pass"), (ExitCode.FAIL, "fail")}:
        return StepOutcome(report["result"], report)
    if report["complete"] and (code, report["result"]) == (ExitCode.ERROR, "error"):
        return StepOutcome("error", report)
    state = "complete" if report["complete"] else "incomplete"
    return StepOutcome(
        "error",
        report,
        f"there is no verdict: the gate ended with exit code {code}, but its report is {state} with the result "
        f"{report['result']!r}",
    )


# --- what the job does with it -------------------------------------------------------------------------------------


def conclude(result: StepOutcome, fail_on: str, *, fail_on_not_judged: bool) -> tuple[bool, str]:
    """Decide whether the job fails, and why; a run without a complete report always fails it.

    Args:
        result: the step's result.
        fail_on: `failed`, `warning` or `never`.
        fail_on_not_judged: whether an adapter that could not be judged fails the job, also if another one failed.
    """
    if result.problem or result.report is None:
        return True, "the job fails: the run has no complete report"
    adapters = result.report["adapters"]
    failed = _names(adapters, lambda adapter: adapter["verdict"] == "failed" and not adapter.get("accepted"))
    errors = _names(adapters, lambda adapter: adapter["verdict"] == "error")
    warned = _names(adapters, lambda adapter: adapter["verdict"] == "passed" and has_warning(adapter))
    counted = [
        (failed, "failed", fail_on != "never", "fail-on is never"),
        (errors, "could not be judged", fail_on_not_judged, "fail-on-not-judged is false"),
        (warned, "passed with warnings", fail_on == "warning", ""),
    ]
    reasons = [f"{len(names)} {state}" for names, state, decides, _ in counted if names and decides]
    if reasons:
        return True, f"the job fails: {', '.join(reasons)}"
    tolerated = [f"{len(names)} {state}, and {why}" for names, state, _, why in counted if names and why]
    return False, "; ".join(tolerated)


def has_warning(adapter: Mapping[str, Any]) -> bool:
    """Whether an entry of a report has a warning."""
    return any(finding["severity"] == "warning" for finding in adapter["findings"])


def passed_names(report: Mapping[str, Any]) -> list[str]:
    """The adapters that passed in all their dtypes."""
    rest = set(_names(report["adapters"], lambda adapter: adapter["verdict"] != "passed"))
    return [name for name in _names(report["adapters"], lambda _: True) if name not in rest]


def failed_names(report: Mapping[str, Any]) -> list[str]:
    """The adapters that failed in at least one dtype."""
    return _names(report["adapters"], lambda adapter: adapter["verdict"] == "failed")


def _names(adapters: Sequence[Mapping[str, Any]], is_meant: Callable[[Mapping[str, Any]], bool]) -> list[str]:
    return list(dict.fromkeys(adapter["name"] for adapter in adapters if is_meant(adapter)))


_HEADING = re.compile(r"## \S+ merge-gate ([A-Z]+)([:,] .*)")
_MOST_HEADLINE = 200
_SUMMARY_START = 2000
"""Characters in which the first heading is; a comment comes before it."""


def headline(result: StepOutcome, summary: str) -> str:
    """The result in a line that a workflow can put anywhere: letters, digits, blanks, and ``,.:;()/_+%-``.

    It is the heading of summary.md. Other characters are left out, so that a shell finds nothing to run in it. If there
    is no complete report, it has the first line of the problem.
    """
    word = result.result.upper()
    lines = [line for line in summary[:_SUMMARY_START].splitlines() if line.startswith("## ")]
    heading = _HEADING.fullmatch(html.unescape(lines[0])) if lines else None
    if result.problem or heading is None or heading[1] != word:
        rest = f": {result.problem.partition(chr(10))[0]}" if result.problem else ""
    else:
        rest = heading[2]
    return re.sub(r"[^A-Za-z0-9 ,.:;()/_+%-]|:(?=:)", "", f"merge-gate {word}{rest}")[:_MOST_HEADLINE].strip()


def published(report: Mapping[str, Any], parent: Path | None) -> list[dict[str, str]]:
    """The models that the report names as published, if they are in `parent`. `sha256` is that of merge-gate.json.

    The report is not trusted: a directory elsewhere, or without merge-gate.json, is not listed.
    """
    models = []
    for adapter in report["adapters"] if parent is not None else ():
        model = adapter.get("published")
        if adapter["verdict"] != "passed" or not isinstance(model, dict) or not isinstance(model.get("directory"), str):
            continue
        folder = Path(model["directory"])
        with contextlib.suppress(OSError, ValueError):
            if folder.parent == parent and folder.name != ".." and not folder.is_symlink():
                manifest = read_regular_file(folder / "merge-gate.json", _MOST_MANIFEST_BYTES)
                models.append(
                    {
                        "name": adapter["name"],
                        "directory": str(folder),
                        "dtype": str(model.get("dtype")),
                        "sha256": hashlib.sha256(manifest).hexdigest(),
                    }
                )
    return models


def interrupted_by(error: GateError, path: Path) -> StepOutcome:
    """The outcome of a run that ended with an error. The verdicts before it are valid."""
    return StepOutcome("error", read_report(path)[0], in_words(error))


def in_words(error: GateError) -> str:
    """The message of an error, with its hint."""
    return error.message + (f"\nWhat to do: {error.hint}" if error.hint else "")


def read_report(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Return the report, or the reason why it cannot be used."""
    try:
        report = parse_strictly(read_regular_file(path, collect.MAX_BYTES["report.json"]))
    except FileNotFoundError:
        return None, "wrote no report"
    except InvalidJsonError as error:
        return None, f"wrote a report that {error}"
    except OSError as error:
        return None, f"wrote a report that cannot be read ({type(error).__name__}: {error})"
    problem = _problem_of(report)
    return (None, problem) if problem else (report, "")


def _problem_of(report: Any) -> str:
    if not _is_known(report):
        return "wrote a report that this version of the action does not support"
    if report["complete"] and not report["adapters"] and not _is_empty_shard(report):
        return "judged nothing"
    contradiction = _contradiction(report)
    return f"wrote a report that contradicts itself: {contradiction}" if contradiction else ""


def _is_empty_shard(report: Mapping[str, Any]) -> bool:
    """Whether this shard has no adapters. The combination of all shards gives the verdict."""
    shard = report.get("shard")
    if not isinstance(shard, dict) or not _has(shard, {"entries": int, "positions": list}):
        return False
    return shard["entries"] > 0 and not shard["positions"]


def _is_known(report: object) -> bool:
    """Whether a report has all the fields that are read here."""
    if not _has(report, _KINDS) or not isinstance(report, dict):
        return False
    adapters = report["adapters"]
    return (
        report["schema_version"].startswith("1.")
        and report["result"] in {"pass", "fail", "error"}
        and all(_has(adapter, _ADAPTER_KINDS) and adapter["verdict"] in _VERDICTS for adapter in adapters)
        and all(_has(finding, _FINDING_KINDS) for adapter in adapters for finding in adapter["findings"])
    )


def _has(value: object, kinds: Mapping[str, Any]) -> bool:
    return isinstance(value, dict) and all(name in value and isinstance(value[name], kinds[name]) for name in kinds)


def _contradictory_verdict(adapter: Mapping[str, Any]) -> str:
    """How the verdict of an adapter contradicts its findings, as the end of a sentence; empty if it does not."""
    errors = {finding["check"] for finding in adapter["findings"] if finding["severity"] == "error"}
    verdict, cause = adapter["verdict"], adapter.get("cause")
    if verdict == "passed" and (errors or cause is not None):
        return f"passed and has {json.dumps(cause or min(errors))[:80]} as an error"
    if verdict != "passed" and cause is None:
        return f"has the verdict {json.dumps(verdict)} and no cause"
    if cause is not None and cause not in errors:
        return f"has the cause {json.dumps(cause)[:80]}, which is none of its errors"
    return "is accepted and has not failed" if adapter.get("accepted") and verdict != "failed" else ""


def _contradiction(report: Mapping[str, Any]) -> str:
    """Return the first verdict that contradicts its findings, or count or result that does not follow; empty if all do.

    The result of an incomplete report is always `error`.
    """
    for adapter in report["adapters"]:
        if problem := _contradictory_verdict(adapter):
            return f"adapter {json.dumps(adapter['name'])[:200]} {problem}"
    verdicts = Counter(adapter["verdict"] for adapter in report["adapters"])
    accepted = sum(bool(adapter.get("accepted")) for adapter in report["adapters"] if adapter["verdict"] == "failed")
    counts = {verdict: verdicts[verdict] for verdict in _VERDICTS}
    if report["counts"] != counts:
        return f"its counts are {json.dumps(report['counts'])[:200]}, expected {json.dumps(counts)} by its adapters"
    if report.get("accepted", 0) != accepted:
        return f"its accepted failures are {json.dumps(report['accepted'])[:200]}, expected {accepted} by its adapters"
    expected = "fail" if counts["failed"] > accepted else "error" if counts["error"] else "pass"
    if report["complete"] and report["result"] != expected:
        return f"its result is {report['result']!r}, expected {expected!r} by its adapters"
    return ""
