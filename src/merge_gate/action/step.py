"""The action's first step: inputs in, outputs out, and never a lost report.

In: the words that entrypoint.py formed from the inputs, and the environment. Out: the step's outputs, the job summary,
annotations, and exit code 0 whatever the verdict is: the action's last step fails the job, after the upload. It is 1
only where no output could be written. Knows neither the Docker SDK nor how the gate judges.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate.action import native, outcome, workflow
from merge_gate.action.docker import collect, sdk
from merge_gate.action.docker.container import ContainerRun, config_word
from merge_gate.action.docker.docker_api import answers
from merge_gate.action.docker.launcher import Told, run_in_container
from merge_gate.action.inputs import ActionInputs, read_inputs, workspace_of
from merge_gate.action.outcome import StepOutcome
from merge_gate.errors import ExitCode, GateError, UsageError
from merge_gate.regular_file import read_regular_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from merge_gate.earlier_reports import EarlierReports


@dataclass
class _Heard:
    """What a run tells while the runner heeds no commands; it is said afterwards."""

    image: str = ""
    warnings: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    earlier: EarlierReports | None = None

    def told(self) -> Told:
        return Told(
            image=lambda name: setattr(self, "image", name), warning=self.warnings.append, refused=self.refused.append
        )


def main(words: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run the gate as the inputs ask; return the step's exit code."""
    inputs, heard = None, _Heard()
    try:
        _check_system(os.name)
        ours = gate_environment(environ)
        inputs = read_inputs(words, environ)
        told = _judge(inputs, ours, heard)
    except GateError as error:
        told = StepOutcome("error", problem=outcome.in_words(error))
    except OSError as error:
        told = StepOutcome(
            "error", problem=f"the runner refused {error.filename or 'a temporary directory'}: {error.strerror}"
        )
    except Exception as error:  # noqa: BLE001 - a crash of the tool must end as `error`, and its outputs be written
        told = StepOutcome("error", problem=f"unexpected {type(error).__name__}: {error}; this is a bug of merge-gate")
    return _tell(inputs, told, heard, environ)


def _check_system(name: str) -> None:
    if name != "posix":
        raise UsageError(
            "this runner is a Windows machine, expected Linux (or macOS with `runtime: native`)",
            hint="run the job on a Linux runner",
        )


# --- the gate ------------------------------------------------------------------------------------------------------


def gate_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the gate: the token under the name that huggingface_hub reads, nothing of the runner's.

    The gate reads files of strangers; it needs none of the runner's tokens, and none of the files that steer a job.
    Raises `UsageError` for a token that is no word.
    """
    ours = {key: value for key, value in environ.items() if not re.match(r"GITHUB_|ACTIONS_|INPUT_|MERGE_GATE_I", key)}
    # A line break at its end, as a file or a pasted secret has it, would make another word of it than the one masked.
    given = environ.get("MERGE_GATE_INPUT_HF_TOKEN", "").strip()
    if re.search(r"\s", given):
        raise UsageError("hf-token: got several words, expected one token", hint="check the secret")
    token = given or environ.get("HF_TOKEN", "").strip()
    marker = {"MERGE_GATE_IMAGE": environ["MERGE_GATE_IMAGE"]} if environ.get("MERGE_GATE_IMAGE") else {}
    debug = {"MERGE_GATE_DEBUG": "1"} if environ.get("RUNNER_DEBUG") == "1" else {}
    workspace = {"GITHUB_WORKSPACE": str(workspace_of(environ))}
    repository, number = environ.get("GITHUB_REPOSITORY", ""), environ.get("GITHUB_RUN_ID", "")
    place = {"MERGE_GATE_PLACE": f"{repository} run {number}"} if repository and number else {}
    return {**ours, **marker, **debug, **workspace, **place, "NO_COLOR": "1", **({"HF_TOKEN": token} if token else {})}


def _judge(inputs: ActionInputs, environ: Mapping[str, str], heard: _Heard) -> StepOutcome:
    run, path = _run_of(inputs, environ), inputs.output / "report.json"
    log = workflow.Log(sys.stdout.buffer, secret=environ.get("HF_TOKEN", ""), config=config_word(run))
    with collect.claimed(inputs.output) as earlier:  # its verdict must not pass for the verdict of this run
        heard.earlier = earlier
        runtime = choose_runtime(inputs.runtime, environ)
    _say(f"merge-gate: runtime {runtime}, report in {inputs.output}")
    log.open()
    try:
        code = _run(runtime, run, log.write, heard)  # which claims the directory itself
    except GateError as error:
        return outcome.broken_off(error, path)
    finally:
        log.close()
    file = workflow.file_in_workspace(inputs.config, run.workspace)
    for line in workflow.annotate_config(log.places if code == ExitCode.USAGE else (), file):
        _say(line)
    return outcome.settle(code, path, log.tail, heard.refused)


def _run_of(inputs: ActionInputs, environ: Mapping[str, str]) -> ContainerRun:
    return ContainerRun(
        config=inputs.config,
        output=inputs.output,
        workspace=Path(environ["GITHUB_WORKSPACE"]),
        image=inputs.image,
        pull=inputs.pull,
        device=inputs.device,
        gpus=inputs.gpus,
        arguments=inputs.arguments,
        hf_cache=inputs.hf_cache,
        cache=inputs.cache,
        mounts=inputs.mounts,
        limits=inputs.limits,
        environ=environ,
        time_limit_s=inputs.time_limit_s,
    )


def _run(runtime: str, run: ContainerRun, log: Callable[[bytes], None], heard: _Heard) -> int:
    if runtime == "native":
        return native.run_here(run, log)
    with sdk.available(run.environ):
        return run_in_container(run, log, heard.told())


def choose_runtime(asked: str, environ: Mapping[str, str]) -> str:
    """`auto`: native inside merge-gate's image; else docker where an engine answers; else native where installed."""
    if asked != "auto":
        return asked
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


# --- what the step says --------------------------------------------------------------------------------------------


def _tell(inputs: ActionInputs | None, told: StepOutcome, heard: _Heard, environ: Mapping[str, str]) -> int:
    report = told.report
    if heard.earlier is not None and heard.earlier.line:
        if report is not None:
            heard.earlier.replace_previous()
        _say(f"merge-gate: {heard.earlier.line}")
    cannot_upload = workflow.missing_artifacts(environ.get("GITHUB_SERVER_URL", ""))
    wants_upload = report is not None and inputs is not None and inputs.upload_report
    for sentence in [*heard.warnings, *([cannot_upload] if wants_upload and cannot_upload else [])]:
        _say(workflow.command("warning", sentence, title="merge-gate"))
    if told.problem:
        _say(workflow.command("error", told.problem, title="merge-gate"))
    if report and inputs:
        file = workflow.file_in_workspace(inputs.config, workspace_of(environ))
        for line in workflow.annotate(report, file):
            _say(line)
    try:
        uploads = wants_upload and not cannot_upload
        outputs = _outputs(inputs, told, heard.image, uploads=uploads)
        workflow.write_outputs(environ.get("GITHUB_OUTPUT", ""), outputs)
        workflow.write_summary(environ.get("GITHUB_STEP_SUMMARY", ""), _summary(inputs, told))
    except OSError as error:
        _say(workflow.command("error", f"cannot write {error.filename}: {error.strerror}", title="merge-gate"))
        return 1
    _say(f"merge-gate: result {told.result}")
    return 0


def _outputs(inputs: ActionInputs | None, told: StepOutcome, image: str, *, uploads: bool) -> dict[str, str]:
    report = told.report
    failed = [adapter["name"] for adapter in report["adapters"] if adapter["verdict"] == "failed"] if report else []
    return {
        "result": told.result,
        "failed": json.dumps(list(dict.fromkeys(failed))),
        "counts": json.dumps(report["counts"] if report else {}),
        "report-path": str(inputs.output) if report and inputs else "",
        "image": image,
        "upload": str(uploads).lower(),
        "upload-path": workflow.literal_patterns(collect.files(inputs.output)) if report and inputs else "",
        "artifact-name": inputs.artifact_name if inputs else "",
        "retention-days": str(inputs.retention_days) if inputs else "",
    }


def _summary(inputs: ActionInputs | None, told: StepOutcome) -> str:
    """The gate's own summary; before it, what kept the gate from a verdict."""
    text = ""
    if inputs and told.report:
        with contextlib.suppress(OSError):
            name = "summary.md"
            text = read_regular_file(inputs.output / name, collect.LIMITS_BYTES[name]).decode("utf-8", "replace")
    if not told.problem:
        return text
    quoted = "\n".join(f"    {line}" for line in told.problem.splitlines())
    return f"### merge-gate: error\n\n{quoted}\n\n{text}"


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 # the runner reads it
