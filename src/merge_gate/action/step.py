"""The action's first step: inputs in, outputs out, and never a lost report.

In: the words that entrypoint.py formed from the inputs, and the environment. Out: the step's outputs, the job summary,
annotations, and exit code 0 whatever the verdict is: the action's last step fails the job, after the upload. It is 1
only where no output could be written. Knows neither the Docker SDK nor how the gate judges. Keeps to Python 3.9 and
its standard library, since it runs on the runner's own Python.

The result is `pass` or `fail` only where exit code and finished report agree; everything else is `error`.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate.action import native, sdk, workflow
from merge_gate.action.docker_api import answers
from merge_gate.action.launcher import ContainerRun, run_in_container
from merge_gate.errors import ExitCode, GateError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_REPORT_LIMIT_BYTES = 256 * 1024 * 1024
_RETENTION_LIMIT_DAYS = 400
OURS = ("--output", "--device", "--container", "--image", "--gpus")
"""Options of `merge-gate run` that have an input of their own, or none."""

_Check = tuple[str, str, str]


@dataclass(frozen=True)
class Inputs:
    """The inputs, checked. Paths are absolute."""

    config: Path
    runtime: str
    gpus: str
    device: str
    image: str
    hf_cache: Path | None
    fail_on: str
    upload_report: bool
    artifact_name: str
    retention_days: int
    output: Path
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What the step says. `problem` is why there is no verdict, empty where there is one."""

    result: str
    report: Mapping[str, Any] | None = None
    problem: str = ""


def main(words: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run the gate as the inputs ask; return the step's exit code."""
    inputs = None
    try:
        inputs = read_inputs(words, environ)
        ours = gate_environment(environ)
        outcome = _judge(inputs, ours, workflow.Log(sys.stdout.buffer, secret=ours.get("HF_TOKEN", "")))
    except GateError as error:
        outcome = Outcome("error", problem=_words(error))
    except Exception as error:  # noqa: BLE001 - a crash of the tool must end as `error`, and its outputs be written
        outcome = Outcome("error", problem=f"unexpected {type(error).__name__}: {error}; this is a bug of merge-gate")
    return _tell(inputs, outcome, environ)


# --- inputs --------------------------------------------------------------------------------------------------------


def read_inputs(words: Sequence[str], environ: Mapping[str, str]) -> Inputs:
    """Check every input and return them. Raises one `UsageError` that names all that is wrong."""
    given = dict(word[2:].partition("=")[::2] for word in words)
    problems = [problem for check in CHECKS if (problem := _problem(given, *check))]
    workspace = _workspace(environ)
    config = Path(os.path.normpath(workspace / given["config"]))
    if not any(problem.startswith("config: ") for problem in problems) and not config.is_file():
        problems.append(f"config: got {given['config']!r}, and {config} is not a file")
    arguments, complaint = _arguments(given["args"])
    if problems or complaint:
        listed = [*problems, *([complaint] if complaint else [])]
        raise UsageError("\n".join(listed), hint="the inputs are described in docs/action.md")
    return Inputs(
        config=config,
        runtime=given["runtime"],
        gpus=given["gpus"],
        device=given["device"],
        image=given["image"],
        hf_cache=(workspace / Path(given["hf-cache"]).expanduser()).resolve() if given["hf-cache"] else None,
        fail_on=given["fail-on"],
        upload_report=given["upload-report"] == "true",
        artifact_name=given["artifact-name"] or _artifact_name(environ),
        retention_days=int(given["retention-days"]),
        output=_output(given["output"], workspace, environ),
        arguments=arguments,
    )


CHECKS: tuple[_Check, ...] = (
    ("config", r"[^\0\r\n]+", "the path of the gate's YAML file (this input is required)"),
    ("runtime", r"auto|docker|native", "auto, docker or native"),
    ("gpus", r"auto|none|all|[A-Za-z0-9][A-Za-z0-9:_,-]*", "auto, none, all, or a list such as 0,1"),
    ("device", r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:N"),
    ("image", r"[A-Za-z0-9][A-Za-z0-9._/:@-]*|", "the name of an image"),
    ("hf-cache", r"[^\0\r\n]*", "a directory"),
    ("fail-on", r"broken|never", "broken or never"),
    ("upload-report", r"true|false", "true or false"),
    ("artifact-name", r'[^"<>|*?\r\n\\/:\0]*', 'a name without " : < > | * ? \\ / and line breaks'),
    ("retention-days", r"\d{1,3}", f"0 to {_RETENTION_LIMIT_DAYS} days (0: the repository's default)"),
    ("output", r"[^\0\r\n]*", "a directory"),
)


def _problem(given: Mapping[str, str], name: str, pattern: str, expected: str) -> str:
    value = given[name]
    good = re.fullmatch(pattern, value) and not (name == "retention-days" and int(value) > _RETENTION_LIMIT_DAYS)
    return "" if good else f"{name}: got {value!r}, expected {expected}"


def _arguments(text: str) -> tuple[tuple[str, ...], str]:
    """Split `args` as a shell would, and complain about what another input says."""
    try:
        split = tuple(shlex.split(text))
    except ValueError as error:
        return (), f"args: got {text!r}, which cannot be split into words ({error})"
    for word in split:
        name = word.partition("=")[0]
        clash = next((own for own in OURS if len(name) > len("--") and own.startswith(name)), "")
        if clash:
            return (), f"args: got {word!r}, expected options other than {clash}, which the action sets itself"
    return split, ""


def _workspace(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("GITHUB_WORKSPACE") or Path.cwd()).resolve()


def _output(given: str, workspace: Path, environ: Mapping[str, str]) -> Path:
    """The directory of the report: the one given, else a new one that the runner removes with the job."""
    if given:
        return Path(os.path.normpath(workspace / given))
    parent = Path(environ.get("RUNNER_TEMP") or workspace).resolve()
    return parent / f"merge-gate-{secrets.token_hex(4)}" / "report"


def _artifact_name(environ: Mapping[str, str]) -> str:
    """A second artifact of the same name fails its job, so legs of a matrix and repeated uses must differ.

    Nothing that a step can see tells two calls of one reusable workflow apart; hence the random end.
    """
    parts = (environ.get("GITHUB_JOB", ""), environ.get("MERGE_GATE_JOB_INDEX", ""), secrets.token_hex(3))
    return re.sub(r"[^A-Za-z0-9._-]", "-", "-".join(["merge-gate-report", *(part for part in parts if part)]))


# --- the gate ------------------------------------------------------------------------------------------------------


def gate_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the gate: the token under the name that huggingface_hub reads, nothing of the runner's.

    The gate reads files of strangers; it needs none of the runner's tokens, and none of the files that steer a job.
    """
    ours = {key: value for key, value in environ.items() if not re.match(r"GITHUB_|ACTIONS_|INPUT_|MERGE_GATE_I", key)}
    token = environ.get("MERGE_GATE_INPUT_HF_TOKEN")
    marker = {"MERGE_GATE_IMAGE": environ["MERGE_GATE_IMAGE"]} if environ.get("MERGE_GATE_IMAGE") else {}
    workspace = {"GITHUB_WORKSPACE": str(_workspace(environ))}
    return {**ours, **marker, **workspace, "NO_COLOR": "1", **({"HF_TOKEN": token} if token else {})}


def _judge(inputs: Inputs, environ: Mapping[str, str], log: workflow.Log) -> Outcome:
    path = inputs.output / "report.json"
    path.unlink(missing_ok=True)  # an earlier run's verdict must not pass for this one's
    runtime = choose_runtime(inputs.runtime, environ)
    _say(f"merge-gate: runtime {runtime}, report in {inputs.output}")
    run = ContainerRun(
        config=inputs.config,
        output=inputs.output,
        workspace=Path(environ["GITHUB_WORKSPACE"]),
        image=inputs.image,
        device=inputs.device,
        gpus=inputs.gpus,
        arguments=inputs.arguments,
        hf_cache=inputs.hf_cache,
        environ=environ,
    )
    log.open()
    try:
        code = _run(runtime, run, log.write)
    except GateError as error:
        return Outcome("error", _read(path)[0], _words(error))  # what was judged before the container was lost is true
    finally:
        log.close()
    return settle(code, path, log.tail)


def _words(error: GateError) -> str:
    return error.message + (f"\nWhat to do: {error.hint}" if error.hint else "")


def _run(runtime: str, run: ContainerRun, log: Callable[[bytes], None]) -> int:
    if runtime == "native":
        return native.run_here(run, log)
    with sdk.available(run.environ):
        return run_in_container(run, log)


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


def settle(code: int, path: Path, said: Sequence[str] = ()) -> Outcome:
    """Set the exit code against the report. `pass` and `fail` need both to say so, and the report to be finished.

    `said` are the gate's last words: where there is no report, they are all that tells why.
    """
    report, trouble = _read(path)
    if report is None:
        return Outcome("error", problem="\n".join([f"the gate ended with exit code {code} and {trouble}", *said]))
    if report["complete"] and (code, report["result"]) in {(ExitCode.PASS, "pass"), (ExitCode.FAIL, "fail")}:
        return Outcome(report["result"], report)
    if report["complete"] and (code, report["result"]) == (ExitCode.ERROR, "error"):
        return Outcome("error", report)
    finished = "finished" if report["complete"] else "unfinished"
    return Outcome(
        "error",
        report,
        f"there is no verdict: the gate ended with exit code {code}, and its report is {finished} and says "
        f"{report['result']!r}",
    )


def _read(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Return the report, or why there is none that can be used."""
    try:
        if path.stat().st_size > _REPORT_LIMIT_BYTES:
            return None, f"wrote a report of more than {_REPORT_LIMIT_BYTES} bytes"
        report = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None, "wrote no report"
    except (OSError, ValueError) as error:
        return None, f"wrote a report that cannot be read ({type(error).__name__})"
    if not _known(report):
        return None, "wrote a report that this version of the action does not know"
    if report["complete"] and not report["adapters"]:
        return None, "judged nothing"
    return report, ""


def _known(report: object) -> bool:
    """Tell whether a report has what is read of it here. It comes out of a container: it is not taken on trust."""
    kinds = {"schema_version": str, "complete": bool, "result": str, "counts": dict, "adapters": list}
    if not isinstance(report, dict) or any(not isinstance(report.get(name), kind) for name, kind in kinds.items()):
        return False
    adapters = report["adapters"]
    fields = {"name": str, "verdict": str, "findings": list, "line": int, "column": int}
    return (
        report["schema_version"].startswith("1.")
        and report["result"] in {"pass", "fail", "error"}
        and all(isinstance(adapter, dict) for adapter in adapters)
        and all(isinstance(adapter.get(name), kind) for adapter in adapters for name, kind in fields.items())
    )


# --- what the step says --------------------------------------------------------------------------------------------


def _tell(inputs: Inputs | None, outcome: Outcome, environ: Mapping[str, str]) -> int:
    report = outcome.report
    failed = [adapter["name"] for adapter in report["adapters"] if adapter["verdict"] == "failed"] if report else []
    if outcome.problem:
        _say(workflow.command("error", outcome.problem, title="merge-gate"))
    if report and inputs:
        file = workflow.file_in_workspace(inputs.config, _workspace(environ))
        for line in workflow.annotate(report, file):
            _say(line)
    outputs = {
        "result": outcome.result,
        "failed": json.dumps(list(dict.fromkeys(failed))),
        "counts": json.dumps(report["counts"] if report else {}),
        "report-path": str(inputs.output) if report and inputs else "",
        "upload": str(bool(report and inputs and inputs.upload_report)).lower(),
        "artifact-name": inputs.artifact_name if inputs else "",
        "retention-days": str(inputs.retention_days) if inputs else "",
    }
    try:
        workflow.write_outputs(environ.get("GITHUB_OUTPUT", ""), outputs)
        workflow.write_summary(environ.get("GITHUB_STEP_SUMMARY", ""), _summary(inputs, outcome))
    except OSError as error:
        _say(workflow.command("error", f"cannot write {error.filename}: {error.strerror}", title="merge-gate"))
        return 1
    _say(f"merge-gate: result {outcome.result}")
    return 0


def _summary(inputs: Inputs | None, outcome: Outcome) -> str:
    """The gate's own summary; before it, what kept the gate from a verdict."""
    path = inputs.output / "summary.md" if inputs and outcome.report else None
    text = path.read_text(encoding="utf-8", errors="replace") if path and path.is_file() else ""
    if not outcome.problem:
        return text
    quoted = "\n".join(f"    {line}" for line in outcome.problem.splitlines())
    return f"### merge-gate: error\n\n{quoted}\n\n{text}"


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 # the runner reads it
