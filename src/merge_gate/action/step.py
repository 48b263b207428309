"""Runs the action's first step: it gates the adapters, and writes outputs, the job summary, and annotations.

Its exit code is 0 for every verdict, so that the report can be uploaded; the action's last step fails the job. The exit
code is 1 only if no output can be written.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate._internal.earlier_reports import locked_for_run, refuse_run
from merge_gate._internal.errors import ExitCode, GateError, LauncherError, UsageError
from merge_gate._internal.interrupts import STOP_GRACE_S, Interrupted, interruptible
from merge_gate._internal.output_files import PUBLISH_WITHIN
from merge_gate._internal.regular_file import read_regular_file
from merge_gate._internal.text import quoted
from merge_gate.action import caches, outcome, workflow
from merge_gate.action.docker import collect
from merge_gate.action.docker.container import ContainerRun, config_word, gate_words
from merge_gate.action.docker.docker_api import answers, vendored_sdk
from merge_gate.action.docker.gpus import CDI_KIND, refuse_contradiction
from merge_gate.action.docker.launcher import run_in_container
from merge_gate.action.inputs import ActionInputs, read_inputs, workspace_of
from merge_gate.action.outcome import StepOutcome
from merge_gate.action.workflow import Event, read_event

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_Messages = defaultdict[str, list[str]]
"""Messages of a run by their kind. The runner obeys no commands during the run, so they are shown afterwards."""

_PROBE = (
    "import importlib.util as u, sys; sys.exit(0 if u.find_spec('merge_gate') and u.find_spec('merge_gate.cli') else 3)"
)
_CHUNK_BYTES = 65_536
_HUB_CACHES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
"""Variables that put the Hub's cache elsewhere than in HF_HOME."""


def main(environ: Mapping[str, str]) -> int:
    """Run the gate with the inputs in the environment; return the step's exit code."""
    inputs, messages = None, _Messages(list)
    try:
        _check_system(os.name)
        own_environ = gate_environment(environ)
        inputs = read_inputs(environ)
        result = _judge(inputs, own_environ, messages)
    except GateError as error:
        result = StepOutcome("error", problem=outcome.in_words(error))
    except OSError as error:
        name = quoted(str(error.filename or "a temporary directory"), 300, "")
        result = StepOutcome("error", problem=f"the runner refused {name}: {error.strerror}")
    except Exception as error:  # noqa: BLE001 - a crash of the tool must end as `error`, and its outputs be written
        result = StepOutcome(
            "error", problem=f"unexpected {type(error).__name__}: {error}; this is a bug of merge-gate"
        )
    if result.problem:
        result = replace(result, problem=_masked(result.problem, environ))
    return _publish(inputs, result, messages, environ)


def _masked(text: str, environ: Mapping[str, str]) -> str:
    """A text without the token, which may be given by mistake as another input, or be part of a library's message."""
    for token in caches.tokens(environ):
        text = text.replace(token, "***")
    return text


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


def _judge(inputs: ActionInputs, environ: Mapping[str, str], messages: _Messages) -> StepOutcome:
    run = replace(inputs.run, environ=environ)
    path = run.output / "report.json"
    log = workflow.Log(sys.stdout.buffer, secret=environ.get("HF_TOKEN", ""), config=config_word(run))
    if run.verifies:
        refuse_run(run.output, chosen_by="`output`")
    with locked_for_run(run.output, chosen_by="`output`"):  # what is there afterwards is the report of this run
        runtime = choose_runtime(inputs.runtime, environ)
    _say(f"merge-gate: runtime {runtime}, report in {run.output}")
    log.open()
    try:
        code = _run(runtime, run, log.write, messages)  # the run locks the directory itself
    except GateError as error:
        return outcome.interrupted_by(error, path)
    finally:
        log.close()
    file = _annotated_file(run)
    for line in workflow.annotate_config(log.places if code == ExitCode.USAGE else (), file):
        _say(line)
    return outcome.decide(code, path, log.tail, messages["refused"])


def _annotated_file(run: ContainerRun) -> str:
    """The configuration, as annotations name it; empty if it is outside the workspace, or if the run has none."""
    return "" if run.verifies else workflow.file_in_workspace(run.config, run.workspace)


def _run(runtime: str, run: ContainerRun, log: Callable[[bytes], None], messages: _Messages) -> int:
    if runtime == "native":
        return run_here(run, log)
    with vendored_sdk(run.environ):
        return run_in_container(run, log, lambda kind, message: messages[kind].append(message))


def choose_runtime(requested: str, environ: Mapping[str, str]) -> str:
    """Resolve `auto`: native in merge-gate's image, or docker if an engine answers, or native if it is installed."""
    if requested != "auto":
        return requested
    if environ.get("MERGE_GATE_IMAGE"):
        return "native"
    if answers(environ):
        return "docker"
    if reason := missing(environ):
        raise UsageError(
            f"runtime: auto, but no container engine answers, and {reason}",
            hint="start Docker on the runner, run the job in merge-gate's image (`container:`), or install merge-gate "
            "in a step before this one",
        )
    _say(workflow.command("warning", "no container engine answers; running natively", title="merge-gate"))
    return "native"


# --- the gate in this environment ----------------------------------------------------------------------------------


def missing(environ: Mapping[str, str]) -> str:
    """Return the reason why the gate cannot run here; empty if it can."""
    if sys.version_info < (3, 11):  # noqa: UP036 # the runner's own
        return f"{sys.executable} is Python {sys.version.split()[0]}, expected 3.11 or newer"
    probe = subprocess.run([sys.executable, "-P", "-c", _PROBE], env=_environment(environ), check=False)
    return f"merge-gate is not installed for {sys.executable}" if probe.returncode else ""


def run_here(run: ContainerRun, log: Callable[[bytes], None], stop_grace_s: float = STOP_GRACE_S) -> int:
    """Run the gate in a child process and return its exit code. Must be called in the main thread."""
    reason = missing(run.environ)
    if reason:
        raise UsageError(
            f"runtime: native, but {reason}",
            hint="run the job in merge-gate's image (`container:`), install merge-gate in a step before this one, or "
            "use `runtime: docker`",
        )
    environ, device = gpus_and_device(run)
    is_elsewhere = run.publish is not None and run.workspace not in run.publish.parents  # the workflow says so
    environ[PUBLISH_WITHIN] = str(run.publish if is_elsewhere else run.workspace)
    # -P keeps the workspace, the child's working directory, off its import path.
    words = gate_words(run, device)
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "merge_gate", *words],
        cwd=run.workspace,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as child:
        try:
            with interruptible(run.timeout_s):
                return _wait(child, log, stop_grace_s)
        except Interrupted:
            return int(ExitCode.ERROR)


def _wait(child: subprocess.Popen[bytes], log: Callable[[bytes], None], stop_grace_s: float) -> int:
    try:
        _pass_on(child, log)
        code = child.wait()
    except Interrupted as interruption:
        log(f"merge-gate: {interruption}; stopping the gate\n".encode())
        child.terminate()
        try:
            child.wait(stop_grace_s)
        except subprocess.TimeoutExpired:
            child.kill()
        raise
    if code in set(ExitCode):
        return code
    raise LauncherError(
        f"the gate ended with exit code {code}, expected 0 to 3", hint="check whether it was killed for lack of memory"
    )


def _pass_on(child: subprocess.Popen[bytes], log: Callable[[bytes], None]) -> None:
    assert child.stdout is not None  # noqa: S101 # PIPE
    read = child.stdout.read1  # type: ignore[attr-defined] # a BufferedReader
    while chunk := read(_CHUNK_BYTES):
        log(chunk)


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without PYTHONPATH: modules of an earlier step would be imported instead of the gate's own."""
    return {name: value for name, value in environ.items() if name != "PYTHONPATH"}


def gpus_and_device(run: ContainerRun) -> tuple[dict[str, str], str]:
    """Limit the GPUs by CUDA's own variable. If GPUs were requested, the run must not fall back to the CPU."""
    environ = _environment(run.environ)
    if run.hf_cache:
        # A token that `hf auth login` has stored stays where it is.
        home = Path(environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
        token = {"HF_TOKEN_PATH": str(home.expanduser() / "token"), **environ}
        environ = {name: value for name, value in token.items() if name not in _HUB_CACHES}
        environ["HF_HOME"] = str(run.hf_cache)
    refuse_contradiction(run.gpus, run.device)
    gpus = run.gpus.replace(CDI_KIND, "")  # CUDA does not know CDI names
    requested = gpus not in {"auto", "none"}
    if gpus == "none":
        environ["CUDA_VISIBLE_DEVICES"] = ""
    elif requested and gpus != "all":
        environ["CUDA_VISIBLE_DEVICES"] = gpus
    return environ, "cuda" if requested and run.device == "auto" else run.device


# --- the step's results --------------------------------------------------------------------------------------------


def _publish(inputs: ActionInputs | None, result: StepOutcome, messages: _Messages, environ: Mapping[str, str]) -> int:
    report = result.report
    cannot_upload = workflow.missing_artifacts(environ.get("GITHUB_SERVER_URL", ""))
    wants_upload = report is not None and inputs is not None and inputs.upload_report
    event = read_event(environ)
    warnings = [*messages["warning"], *([cannot_upload] if wants_upload and cannot_upload else [])]
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
            **_outputs(inputs, result, "".join(messages["image"]), summary, uploads=uploads),
            **_next_steps(inputs, result, event),
            **caches.key_outputs(environ),
        }
        outputs = {name: _masked(value, environ) for name, value in outputs.items()}
        workflow.write_outputs(environ.get("GITHUB_OUTPUT", ""), outputs)
        note = f"> {without_token}\n\n" if without_token else ""
        text = _masked(_with_problem(summary, result) + note, environ)
        workflow.write_summary(environ.get("GITHUB_STEP_SUMMARY", ""), text)
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
        _, reason = outcome.conclude(result, "failed", fail_on_not_judged=True)
        return {"conclusion": "failure", "reason": reason, "comment": "false", "upload-sarif": "false"}
    fails, reason = outcome.conclude(result, inputs.fail_on, fail_on_not_judged=inputs.fail_on_not_judged)
    has_sarif = result.report is not None and bool(result.report["complete"]) and not result.problem
    return {
        "conclusion": "failure" if fails else "success",
        "reason": reason,
        "comment": str(inputs.comment and bool(event.pull_request) and event.is_trusted).lower(),
        "upload-sarif": str(inputs.upload_sarif and has_sarif and event.is_trusted).lower(),
    }


def _summary(inputs: ActionInputs | None, result: StepOutcome) -> str:
    """The gate's summary; empty if there is none."""
    text = ""
    if inputs and result.report:
        with contextlib.suppress(OSError):
            name = "summary.md"
            text = read_regular_file(inputs.run.output / name, collect.MAX_BYTES[name]).decode("utf-8", "replace")
    return text


def _with_problem(summary: str, result: StepOutcome) -> str:
    """The summary, after the reason why there is no verdict (if there is one)."""
    if not result.problem:
        return summary
    quoted = "\n".join(f"    {line}" for line in result.problem.splitlines())
    return f"### merge-gate: error\n\n{quoted}\n\n{summary}"


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 # the runner reads it
