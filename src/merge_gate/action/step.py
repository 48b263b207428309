"""Runs the action's first step: it gates the adapters, and writes outputs, the job summary, and annotations.

Its exit code is 0 for every verdict, so that the report can be uploaded; the action's last step fails the job. The exit
code is 1 only if no output can be written.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate.action import caches, native, outcome, workflow
from merge_gate.action.docker import collect, sdk
from merge_gate.action.docker.container import ContainerRun, config_word
from merge_gate.action.docker.docker_api import answers
from merge_gate.action.docker.launcher import RunListener, run_in_container
from merge_gate.action.event import Event, read_event
from merge_gate.action.inputs import ActionInputs, read_inputs, workspace_of
from merge_gate.action.outcome import StepOutcome
from merge_gate.earlier_reports import refuse_run
from merge_gate.errors import ExitCode, GateError, UsageError
from merge_gate.regular_file import read_regular_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass
class _RunMessages:
    """Messages collected during a run, while the runner obeys no commands. They are shown afterwards."""

    image: str = ""
    warnings: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def listener(self) -> RunListener:
        return RunListener(
            image=lambda name: setattr(self, "image", name), warning=self.warnings.append, refused=self.refused.append
        )


def main(words: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run the gate with these inputs; return the step's exit code."""
    inputs, messages = None, _RunMessages()
    try:
        _check_system(os.name)
        own_environ = gate_environment(environ)
        inputs = read_inputs(words, environ)
        result = _judge(inputs, own_environ, messages)
    except GateError as error:
        result = StepOutcome("error", problem=outcome.in_words(error))
    except OSError as error:
        result = StepOutcome(
            "error", problem=f"the runner refused {error.filename or 'a temporary directory'}: {error.strerror}"
        )
    except Exception as error:  # noqa: BLE001 - a crash of the tool must end as `error`, and its outputs be written
        result = StepOutcome(
            "error", problem=f"unexpected {type(error).__name__}: {error}; this is a bug of merge-gate"
        )
    return _publish(inputs, result, messages, environ)


def _check_system(name: str) -> None:
    if name != "posix":
        raise UsageError(
            "this runner uses Windows, expected Linux (or macOS with `runtime: native`)",
            hint="run the job on a Linux runner",
        )


# --- the gate ------------------------------------------------------------------------------------------------------


def gate_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the gate: the token under the name that huggingface_hub reads, without the runner's variables.

    The gate reads hostile files, and needs none of the runner's tokens or of the files that control a job.
    Raises `UsageError` for a token with white space.
    """
    own = {key: value for key, value in environ.items() if not re.match(r"GITHUB_|ACTIONS_|INPUT_|MERGE_GATE_I", key)}
    # A trailing line break, from a file or a pasted secret, would make the token differ from the masked one.
    input_token = environ.get("MERGE_GATE_INPUT_HF_TOKEN", "").strip()
    if re.search(r"\s", input_token):
        raise UsageError("hf-token: got several words, expected one token", hint="check the secret")
    token = input_token or environ.get("HF_TOKEN", "").strip()
    marker = {"MERGE_GATE_IMAGE": environ["MERGE_GATE_IMAGE"]} if environ.get("MERGE_GATE_IMAGE") else {}
    debug = {"MERGE_GATE_DEBUG": "1"} if environ.get("RUNNER_DEBUG") == "1" else {}
    workspace = {"GITHUB_WORKSPACE": str(workspace_of(environ))}
    repository, number = environ.get("GITHUB_REPOSITORY", ""), environ.get("GITHUB_RUN_ID", "")
    place = {"MERGE_GATE_PLACE": f"{repository} run {number}"} if repository and number else {}
    commit = {"MERGE_GATE_COMMIT": environ["GITHUB_SHA"]} if environ.get("GITHUB_SHA") else {}
    facts = {**marker, **debug, **workspace, **place, **commit}
    return {**own, **facts, "NO_COLOR": "1", **({"HF_TOKEN": token} if token else {})}


def _judge(inputs: ActionInputs, environ: Mapping[str, str], messages: _RunMessages) -> StepOutcome:
    run = replace(inputs.run, environ=environ)
    path = run.output / "report.json"
    log = workflow.Log(sys.stdout.buffer, secret=environ.get("HF_TOKEN", ""), config=config_word(run))
    if run.verifies:
        refuse_run(run.output, chosen_by="`output`")
    with collect.claimed(run.output):  # an earlier report must not be mistaken for the report of this run
        runtime = choose_runtime(inputs.runtime, environ)
    _say(f"merge-gate: runtime {runtime}, report in {run.output}")
    log.open()
    try:
        code = _run(runtime, run, log.write, messages)  # the run claims the directory itself
    except GateError as error:
        return outcome.interrupted_by(error, path)
    finally:
        log.close()
    file = _annotated_file(run)
    for line in workflow.annotate_config(log.places if code == ExitCode.USAGE else (), file):
        _say(line)
    return outcome.decide(code, path, log.tail, messages.refused)


def _annotated_file(run: ContainerRun) -> str:
    """The configuration, as annotations name it; empty if it is outside the workspace, or if the run has none."""
    return "" if run.verifies else workflow.file_in_workspace(run.config, run.workspace)


def _run(runtime: str, run: ContainerRun, log: Callable[[bytes], None], messages: _RunMessages) -> int:
    if runtime == "native":
        return native.run_here(run, log)
    with sdk.available(run.environ):
        return run_in_container(run, log, messages.listener())


def choose_runtime(requested: str, environ: Mapping[str, str]) -> str:
    """Resolve `auto`: native in merge-gate's image, or docker if an engine answers, or native if it is installed."""
    if requested != "auto":
        return requested
    if environ.get("MERGE_GATE_IMAGE"):
        return "native"
    if answers(environ):
        return "docker"
    if native.missing(environ):
        raise UsageError(
            f"runtime: auto, but no container engine answers, and {native.missing(environ)}",
            hint="start Docker on the runner, run the job in merge-gate's image (`container:`), or install merge-gate "
            "in a step before this one",
        )
    _say(workflow.command("warning", "no container engine answers; running natively", title="merge-gate"))
    return "native"


# --- the step's results --------------------------------------------------------------------------------------------


def _publish(
    inputs: ActionInputs | None, result: StepOutcome, messages: _RunMessages, environ: Mapping[str, str]
) -> int:
    report = result.report
    cannot_upload = workflow.missing_artifacts(environ.get("GITHUB_SERVER_URL", ""))
    wants_upload = report is not None and inputs is not None and inputs.upload_report
    event = read_event(environ)
    warnings = [*messages.warnings, *([cannot_upload] if wants_upload and cannot_upload else [])]
    warnings += [caches.why_not_saved(environ)] if inputs else []
    without_token = _fork_without_token(event, report, environ)
    for sentence in filter(None, [*warnings, without_token]):
        _say(workflow.command("warning", sentence, title="merge-gate"))
    if result.problem:
        _say(workflow.command("error", result.problem, title="merge-gate"))
    if report and inputs:
        file = _annotated_file(inputs.run)
        for line in workflow.annotate(report, file, warnings=inputs.fail_on == "warning"):
            _say(line)
    try:
        uploads = wants_upload and not cannot_upload
        summary = _summary(inputs, result)
        outputs = {
            **_outputs(inputs, result, messages.image, summary, uploads=uploads),
            **_next_steps(inputs, result, event),
            **caches.key_outputs(environ),
        }
        workflow.write_outputs(environ.get("GITHUB_OUTPUT", ""), outputs)
        note = f"> {without_token}\n\n" if without_token else ""
        workflow.write_summary(environ.get("GITHUB_STEP_SUMMARY", ""), _with_problem(summary, result) + note)
    except OSError as error:
        _say(workflow.command("error", f"cannot write {error.filename}: {error.strerror}", title="merge-gate"))
        return 1
    _say(f"merge-gate: result {result.result}")
    return 0


def _fork_without_token(event: Event, report: Mapping[str, Any] | None, environ: Mapping[str, str]) -> str:
    """The reason why a pull request from a fork cannot read a private or gated repository; empty for other runs."""
    if not event.is_fork or not report or not report["counts"]["error"] or gate_environment(environ).get("HF_TOKEN"):
        return ""
    return (
        "This run is a pull request from a fork. GitHub passes no secrets to it, so it has no token of the Hub, and "
        "cannot read private or gated repositories. Adapters that need them could not be judged: run the gate again on "
        "a branch of this repository after a review."
    )


def _outputs(
    inputs: ActionInputs | None, result: StepOutcome, image: str, summary: str, *, uploads: bool
) -> dict[str, str]:
    report = result.report
    proven = None if result.problem else report  # another process may have written what is there
    there = {path.name: str(path) for path in collect.files(inputs.run.output)} if report and inputs else {}
    return {
        "result": result.result,
        "failed": json.dumps(outcome.failed_names(report) if report else []),
        "passed": json.dumps(outcome.passed_names(proven) if proven else []),
        "counts": json.dumps(report["counts"] if report else {}),
        "headline": outcome.headline(result, summary),
        "published": json.dumps(outcome.published(proven, inputs.run.publish) if proven and inputs else []),
        "report-path": str(inputs.run.output) if report and inputs else "",
        "report-json": there.get("report.json", ""),
        "report-html": there.get("report.html", ""),
        "sarif": there.get("report.sarif", ""),
        "summary": there.get("summary.md", "") if proven else "",
        "image": image,
        "upload": str(uploads).lower(),
        "upload-path": workflow.literal_patterns(list(map(Path, there.values()))),
        "artifact-name": inputs.artifact_name if inputs else "",
        "retention-days": str(inputs.retention_days) if inputs else "",
    }


def _next_steps(inputs: ActionInputs | None, result: StepOutcome, event: Event) -> dict[str, str]:
    """What the action's later steps do: the job's end, the comment, and the upload for code scanning."""
    if inputs is None:
        conclusion = outcome.conclude(result, "failed", fail_on_not_judged=True)
        return {"conclusion": "failure", "reason": conclusion.reason, "comment": "false", "upload-sarif": "false"}
    conclusion = outcome.conclude(result, inputs.fail_on, fail_on_not_judged=inputs.fail_on_not_judged)
    has_sarif = result.report is not None and bool(result.report["complete"]) and not result.problem
    return {
        "conclusion": "failure" if conclusion.fails else "success",
        "reason": conclusion.reason,
        "comment": str(inputs.comment and bool(event.pull_request) and event.is_trusted).lower(),
        "upload-sarif": str(inputs.upload_sarif and has_sarif and event.is_trusted).lower(),
    }


def _summary(inputs: ActionInputs | None, result: StepOutcome) -> str:
    """The gate's summary; empty if there is none."""
    text = ""
    if inputs and result.report:
        with contextlib.suppress(OSError):
            name = "summary.md"
            text = read_regular_file(inputs.run.output / name, collect.LIMITS_BYTES[name]).decode("utf-8", "replace")
    return text


def _with_problem(summary: str, result: StepOutcome) -> str:
    """The summary, after the reason why there is no verdict (if there is one)."""
    if not result.problem:
        return summary
    quoted = "\n".join(f"    {line}" for line in result.problem.splitlines())
    return f"### merge-gate: error\n\n{quoted}\n\n{summary}"


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 # the runner reads it
