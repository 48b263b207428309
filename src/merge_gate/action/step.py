"""Runs the action's first step: it gates the adapters, and lets `merge-gate ci github` show the report.

Both run in the same environment, one after the other. If there is no report, or if the environment does not start, this
module shows the reason itself. Its exit code is 0 for every verdict, so that the report can be uploaded; the action's
last step fails the job. The exit code is 1 only if no output can be written.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate.action import caches, native, workflow
from merge_gate.action.docker import collect, sdk
from merge_gate.action.docker.container import HANDED_OVER, ContainerRun, config_word
from merge_gate.action.docker.docker_api import answers
from merge_gate.action.docker.launcher import RunListener, run_in_container, scratch
from merge_gate.action.event import read_event
from merge_gate.action.inputs import ActionInputs, read_inputs, workspace_of
from merge_gate.earlier_reports import refuse_run
from merge_gate.errors import ExitCode, GateError, UsageError
from merge_gate.report.wording.untrusted import safe_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


_MOST_TAIL = 20_000
_READING_LIMIT_S = 120.0


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
    inputs, messages, problem = None, _RunMessages(), ""
    try:
        _check_system(os.name)
        own_environ = gate_environment(environ)
        inputs = read_inputs(words, environ)
        problem = _judge(inputs, own_environ, messages, environ)
    except GateError as error:
        problem = _in_words(error)
    except OSError as error:
        problem = f"the runner refused {error.filename or 'a temporary directory'}: {error.strerror}"
    except Exception as error:  # noqa: BLE001 - a crash of the tool must end as `error`, and its outputs be written
        problem = f"unexpected {type(error).__name__}: {error}; this is a bug of merge-gate"
    return _finish(inputs, problem, messages, environ)


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


def _judge(
    inputs: ActionInputs, environ: Mapping[str, str], messages: _RunMessages, runner_environ: Mapping[str, str]
) -> str:
    """Run the gate, and show its report. Return the reason if nothing was shown; else an empty text."""
    run = replace(inputs.run, environ=environ)
    log = workflow.Log(sys.stdout.buffer, secret=environ.get("HF_TOKEN", ""), config=config_word(run))
    if run.verifies:
        refuse_run(run.output, chosen_by="`output`")
    with collect.claimed(run.output):  # an earlier report must not be mistaken for the report of this run
        runtime = choose_runtime(inputs.runtime, environ)
    _say(f"merge-gate: runtime {runtime}, report in {run.output}")
    code, problem = int(ExitCode.ERROR), ""
    log.open()
    try:
        code = _run(runtime, run, log.write, messages)  # the run claims the directory itself
    except GateError as error:
        problem = _in_words(error)
    finally:
        log.close()
    if messages.refused:  # other code has written to the directory, so no file there counts as a verdict
        problem = "\n".join(["there is no verdict: the report was tampered with", *messages.refused])
    for line in workflow.annotate_config(log.places if code == ExitCode.USAGE else (), inputs.facts.file):
        _say(line)
    if problem and not collect.files(run.output):
        return problem
    tail = "\n".join(log.tail)[-_MOST_TAIL:]
    job = replace(_job(inputs, environ, runner_environ), exit_code=code, problem=problem, last_lines=tail)
    return _show(runtime, run, job, messages)


def _job(inputs: ActionInputs, environ: Mapping[str, str], runner_environ: Mapping[str, str]) -> workflow.JobFacts:
    """The facts of the job. A server without artifacts is a warning."""
    event = read_event(runner_environ)
    cannot_upload = workflow.missing_artifacts(runner_environ.get("GITHUB_SERVER_URL", ""))
    if inputs.facts.uploads_report and cannot_upload:
        _say(workflow.command("warning", cannot_upload, title="merge-gate"))
    files = (runner_environ.get(name, "") for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY"))
    output, summary = (name and os.path.realpath(name) for name in files)  # a container sees no link of the runner
    return replace(
        inputs.facts,
        uploads_report=inputs.facts.uploads_report and not cannot_upload,
        uploads_sarif=inputs.facts.uploads_sarif and event.is_trusted,
        lacks_token=event.is_fork and not environ.get("HF_TOKEN"),
        output_file=output,
        summary_file=summary,
    )


def _show(runtime: str, run: ContainerRun, job: workflow.JobFacts, messages: _RunMessages) -> str:
    """Show the report: a second process in the environment of the gate, which sees the report and no secret.

    Return the reason if it showed nothing; else an empty text. Its annotations are the only commands that it may give.
    """
    said = bytearray()
    files = tuple(Path(name) for name in (job.output_file, job.summary_file) if name)
    for file in files:
        file.touch()  # an engine may make a directory in the place of a missing file
    environ = {name: value for name, value in run.environ.items() if name not in HANDED_OVER}
    with contextlib.ExitStack() as clearing:
        reading = ContainerRun(
            config=None,
            output=scratch(environ, "job", clearing),
            workspace=run.output,
            image=messages.image or run.image,
            pull="never",
            device="cpu",
            gpus="none",
            mounts=(run.publish,) if run.publish else (),
            job=json.dumps(asdict(job)),
            job_files=files,
            environ={**environ, "HF_HUB_OFFLINE": "1"},
            time_limit_s=_READING_LIMIT_S,
        )
        try:
            code = _run(runtime, reading, said.extend, messages)
        except GateError as error:
            return job.problem or _in_words(error)
    text = said.decode("utf-8", "replace")
    if code == ExitCode.PASS:
        for line in text.rstrip("\n").split("\n"):
            _say(line if line.startswith(("::error ", "::warning ")) else safe_text(line))
        return ""
    return job.problem or f"the report of the gate was not read: `merge-gate ci github` ended with {code}\n{text}"


def _in_words(error: GateError) -> str:
    """The message of an error, with its hint."""
    return error.message + (f"\nWhat to do: {error.hint}" if error.hint else "")


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


def _finish(inputs: ActionInputs | None, problem: str, messages: _RunMessages, environ: Mapping[str, str]) -> int:
    """Show `problem`, if there is one, and write the outputs that no report decides."""
    for sentence in filter(None, [*messages.warnings, caches.why_not_saved(environ) if inputs else ""]):
        _say(workflow.command("warning", sentence, title="merge-gate"))
    if problem:
        _say(workflow.command("error", problem, title="merge-gate"))
    event = read_event(environ)
    comments = inputs is not None and inputs.comment and bool(event.pull_request) and event.is_trusted
    outputs = {
        **({**workflow.NO_REPORT, **workflow.without_verdict(problem)} if problem else {}),
        "image": messages.image,
        "artifact-name": inputs.artifact_name if inputs else "",
        "retention-days": str(inputs.retention_days) if inputs else "",
        "comment": str(comments).lower(),
        **caches.key_outputs(environ),
    }
    try:
        workflow.write_outputs(environ.get("GITHUB_OUTPUT", ""), outputs)
        if problem:
            workflow.write_summary(environ.get("GITHUB_STEP_SUMMARY", ""), workflow.with_problem("", problem))
            _say("merge-gate: result error")
    except OSError as error:
        _say(workflow.command("error", f"cannot write {error.filename}: {error.strerror}", title="merge-gate"))
        return 1
    return 0


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 # the runner reads it
