"""Shows a report in a job on GitHub: annotations, outputs, and the job summary.

In: a report that was copied out of a container, and the facts of the facts. Out: what the runner reads. The result is
`pass` or `fail` only if the gate's exit code and a complete report agree. Anything else is `error`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate.action import workflow
from merge_gate.action.docker import collect
from merge_gate.errors import ExitCode, UsageError
from merge_gate.output_files import OUTPUT_FILES
from merge_gate.records.terms import Result, Severity, Verdict
from merge_gate.regular_file import read_regular_file
from merge_gate.report.formats import json_report, summary
from merge_gate.report.formats.fields import dump
from merge_gate.report.wording import run_result, words
from merge_gate.report.wording.run_result import AdapterState
from merge_gate.report.wording.untrusted import one_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from merge_gate.records.report import AdapterReport, Report
    from merge_gate.records.terms import Finding

_REPORT = OUTPUT_FILES[0]
_MOST_MANIFEST_BYTES = 16 * 1024 * 1024
_NAME_LIMIT = 80
_FORK_NOTE = (
    "This run is a pull request from a fork. GitHub passes no secrets to it, so it has no token of the Hub, and "
    "cannot read private or gated repositories. Adapters that need them could not be judged: run the gate again on "
    "a branch of this repository after a review."
)


def show(directory: Path, facts: workflow.JobFacts) -> None:
    """Show the report in `directory`.

    Raises:
        OSError: a file of the runner cannot be written.
    """
    report, why = read(directory, facts)
    problem = facts.problem or why
    note = _FORK_NOTE if report and report.counts.error and facts.lacks_token else ""
    lines = [workflow.command("warning", note, title="merge-gate")] if note else []
    lines += [workflow.command("error", problem, title="merge-gate")] if problem else []
    lines += annotate(report, facts.file, warnings=facts.fail_on == "warning") if report else []
    outputs = dict(_outputs(report, facts, directory) if report else workflow.NO_REPORT)
    outputs.update(workflow.without_verdict(problem) if problem else {})
    workflow.write_outputs(facts.output_file, outputs)
    text = workflow.with_problem(summary.render(report) if report else "", problem)
    workflow.write_summary(facts.summary_file, text + (f"> {note}\n\n" if note else ""))
    lines.append(f"merge-gate: result {outputs['result']}")
    print("\n".join(lines), flush=True)  # noqa: T201 - the runner reads it


def read(directory: Path, facts: workflow.JobFacts) -> tuple[Report | None, str]:
    """Return the report, if it can be used, and the reason why it is no verdict; empty if it is one."""
    ended = f"the gate ended with exit code {facts.exit_code}"
    report, why = None, " and wrote no report"
    try:
        report = json_report.read(read_regular_file(directory / _REPORT.name, _REPORT.limit_bytes), _REPORT.name)
    except FileNotFoundError:
        pass
    except UsageError as error:
        why = f", and {error.message}"
    except OSError as error:
        why = f", and {_REPORT.name} cannot be read: {error.strerror}"
    if report is None or report.stale:
        return None, f"{ended}{why}\n{facts.last_lines}".strip()
    if report.complete and report.result is Result.ERROR and not report.counts.error:
        return None, f"{ended} and judged nothing"
    if report.complete and facts.exit_code == ExitCode[report.result.name]:
        return report, ""
    state = "complete" if report.complete else "incomplete"
    return report, f"there is no verdict: {ended}, but its report is {state} with the result {report.result.value!r}"


# --- outputs -------------------------------------------------------------------------------------------------------


def _outputs(report: Report, facts: workflow.JobFacts, directory: Path) -> dict[str, str]:
    adapters = run_result.adapters_of(report)
    verdicts = {adapter.name: {entry.verdict for entry in adapter.entries} for adapter in adapters}
    there = {path.name: str(path) for path in collect.files(directory)}
    fails, reason = conclude(adapters, facts.fail_on, fail_on_not_judged=facts.fail_on_not_judged)
    return {
        "result": report.result.value,
        "failed": json.dumps([name for name, several in verdicts.items() if Verdict.FAILED in several]),
        "passed": json.dumps([name for name, several in verdicts.items() if several == {Verdict.PASSED}]),
        "counts": json.dumps(dump(report.counts)),
        "headline": workflow.headline(run_result.verdict_line(report)),
        "published": json.dumps(published(report, Path(facts.publish)) if facts.publish else []),
        "report-path": str(directory),
        "report-json": there.get("report.json", ""),
        "report-html": there.get("report.html", ""),
        "sarif": there.get("report.sarif", ""),
        "summary": there.get("summary.md", ""),
        "upload": str(facts.uploads_report).lower(),
        "upload-path": workflow.literal_patterns(list(map(Path, there.values()))),
        "conclusion": "failure" if fails else "success",
        "reason": reason,
        "upload-sarif": str(facts.uploads_sarif).lower(),
    }


def conclude(adapters: Sequence[run_result.Adapter], fail_on: str, *, fail_on_not_judged: bool) -> tuple[bool, str]:
    """Return whether the job fails, and the reason; empty if there is nothing to explain."""
    failed = sum(adapter.state is AdapterState.FAILED for adapter in adapters)
    errors = sum(adapter.is_undecided for adapter in adapters)
    warned = sum(any(entry.verdict is Verdict.PASSED for entry, _ in adapter.warnings) for adapter in adapters)
    counted = (
        (failed, "failed", fail_on != "never", "fail-on is never"),
        (errors, "could not be judged", fail_on_not_judged, "fail-on-not-judged is false"),
        (warned, "passed with warnings", fail_on == "warning", ""),
    )
    reasons = [f"{count} {state}" for count, state, decides, _ in counted if count and decides]
    if reasons:
        return True, f"the job fails: {', '.join(reasons)}"
    return False, "; ".join(f"{count} {state}, and {why}" for count, state, _, why in counted if count and why)


def published(report: Report, parent: Path) -> list[dict[str, str]]:
    """Return the models that the report names as published, if they are in `parent`. `sha256` is of merge-gate.json.

    The report is not trusted: a directory elsewhere, or without merge-gate.json, is not listed.
    """
    models = []
    for entry in report.adapters:
        if entry.verdict is not Verdict.PASSED or entry.published is None:
            continue
        folder = Path(entry.published.directory)
        with contextlib.suppress(OSError, ValueError):
            if folder.parent == parent and folder.name != ".." and not folder.is_symlink():
                manifest = read_regular_file(folder / "merge-gate.json", _MOST_MANIFEST_BYTES)
                digest = hashlib.sha256(manifest).hexdigest()
                dtype = entry.published.dtype
                models.append({"name": entry.name, "directory": str(folder), "dtype": dtype, "sha256": digest})
    return models


# --- annotations ---------------------------------------------------------------------------------------------------


def annotate(report: Report, file: str, *, warnings: bool = False) -> list[str]:
    """Return an error for each adapter that failed or could not be judged, failed adapters first.

    The same error of an adapter in several dtypes is reported once. A failure that the baseline accepts is a warning,
    after the others; so is the first warning of an adapter that passed, if `warnings` is set. `file` is the
    configuration relative to the workspace; empty if it is outside.
    """
    blocking = [
        entry
        for entry in report.adapters
        if entry.verdict is not Verdict.PASSED or (warnings and words.warnings(entry))
    ]
    passed, failed = Verdict.PASSED, Verdict.FAILED
    blocking.sort(key=lambda entry: (entry.verdict is passed, entry.accepted is not None, entry.verdict is not failed))
    annotations = list(dict.fromkeys(_annotation(entry, file) for entry in blocking))
    shown = annotations[: workflow.MAX_ANNOTATIONS]
    more = len(annotations) - len(shown)
    if more:
        sentence = f"and {more} more; see the job summary or report.json"
        shown.append(workflow.command("error", sentence, title="merge-gate"))
    return shown


def _annotation(entry: AdapterReport, file: str) -> str:
    is_passed = entry.verdict is Verdict.PASSED
    finding = words.warnings(entry)[0] if is_passed else words.deciding(entry)
    cause = finding.check if is_passed and finding else words.cause(entry)
    title = f"{one_line(entry.name, _NAME_LIMIT)} {entry.verdict.value}: {one_line(cause, _NAME_LIMIT)}"
    place = {"file": file, "line": str(entry.line), "col": str(entry.column)} if file else {}
    is_warning = is_passed or (entry.verdict is Verdict.FAILED and entry.accepted is not None)
    message = _message(finding) if finding else "No finding was recorded. See the log."
    return workflow.command("warning" if is_warning else "error", message, **place, title=title)


def _message(finding: Finding) -> str:
    tensor = finding.tensor
    parts = (
        ("", finding.message),
        ("Where: ", "" if tensor and tensor in finding.message else tensor),
        ("What to do: ", finding.hint),
        ("More: ", words.more(finding) if finding.severity is Severity.ERROR else words.page(finding)),
    )
    return "\n".join(f"{label}{one_line(text, words.MESSAGE_LIMIT)}" for label, text in parts if text)
