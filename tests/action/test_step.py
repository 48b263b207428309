"""The action's first step: what it asks of its inputs, when it says pass, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import entrypoint
from merge_gate.action import step as action
from merge_gate.demo import make_demo
from merge_gate.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = {
    "config": "gate.yml", "runtime": "auto", "gpus": "auto", "device": "auto", "image": "", "hf-cache": "",
    "fail-on": "broken", "upload-report": "true", "artifact-name": "", "retention-days": "0", "output": "", "args": "",
}  # fmt: skip


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    workspace = tmp_path / "work"
    workspace.mkdir()
    (workspace / "gate.yml").write_text("version: 1\n", encoding="utf-8")
    (tmp_path / "temp").mkdir()
    return {
        "GITHUB_WORKSPACE": str(workspace),
        "RUNNER_TEMP": str(tmp_path / "temp"),
        "GITHUB_JOB": "release gate",
        "GITHUB_OUTPUT": str(tmp_path / "output"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
        "DOCKER_HOST": "unix:///nowhere/docker.sock",
        "PATH": os.environ["PATH"],
    }


def words(**changed: str) -> list[str]:
    given = {**DEFAULTS, **{name.replace("_", "-"): value for name, value in changed.items()}}
    return [f"--{name}={value}" for name, value in given.items()]


# --- inputs ----------------------------------------------------------------------------------------------------------


def test_the_defaults_are_good(environ: dict[str, str]) -> None:
    inputs = action.read_inputs(words(), environ)
    assert inputs.config == Path(environ["GITHUB_WORKSPACE"], "gate.yml")
    assert inputs.output.parent.parent == Path(environ["RUNNER_TEMP"])
    assert inputs.upload_report is True
    assert re.fullmatch(r"merge-gate-report-release-gate-[0-9a-f]{6}", inputs.artifact_name)


def test_no_two_uses_share_an_artifact_or_a_directory(environ: dict[str, str]) -> None:
    first, second = (action.read_inputs(words(), {**environ, "MERGE_GATE_JOB_INDEX": "3"}) for _ in range(2))
    assert first.artifact_name != second.artifact_name
    assert first.artifact_name.startswith("merge-gate-report-release-gate-3-")
    assert first.output != second.output


def test_values_may_look_like_anything(environ: dict[str, str]) -> None:
    directory = Path(environ["GITHUB_WORKSPACE"], "--output=x y")
    directory.mkdir()
    (directory / "a=b.yml").touch()
    inputs = action.read_inputs(words(config="--output=x y/a=b.yml", args="--only 'a b' --only=c"), environ)
    assert inputs.config.name == "a=b.yml"
    assert inputs.arguments == ("--only", "a b", "--only=c")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("config", ""),
        ("config", "other.yml"),
        ("config", "a\nb"),
        ("runtime", "Docker"),
        ("runtime", ""),
        ("gpus", "-1"),
        ("device", "cuda:x"),
        ("image", "--privileged"),
        ("image", "a b"),
        ("fail-on", "error"),
        ("upload-report", "True"),
        ("upload-report", "yes"),
        ("upload-report", ""),
        ("artifact-name", "a/b"),
        ("retention-days", "-1"),
        ("retention-days", "401"),
        ("retention-days", "1.5"),
        ("args", "--only 'a"),
        ("args", "--output x"),
        ("args", "--out=x"),
        ("args", "--device cpu"),
        ("args", "--container"),
    ],
)
def test_a_wrong_input_is_named_with_what_was_expected(environ: dict[str, str], name: str, value: str) -> None:
    with pytest.raises(UsageError, match=rf"^{name}: got ") as raised:
        action.read_inputs(words(**{name.replace("-", "_"): value}), environ)
    assert "\n" not in raised.value.message
    assert "docs/action.md" in raised.value.hint


def test_all_wrong_inputs_are_named_at_once(environ: dict[str, str]) -> None:
    with pytest.raises(UsageError) as raised:
        action.read_inputs(words(runtime="x", device="x", args="--output x"), environ)
    assert [line.split(":")[0] for line in raised.value.message.splitlines()] == ["runtime", "device", "args"]


# --- environment -----------------------------------------------------------------------------------------------------


def test_the_gate_gets_the_hubs_token_and_none_of_the_runners(environ: dict[str, str]) -> None:
    runners = {"ACTIONS_RUNTIME_TOKEN": "a", "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "b", "GITHUB_TOKEN": "c", "INPUT_X": "d"}
    given = {
        **environ,
        **runners,
        "MERGE_GATE_INPUT_HF_TOKEN": "hf",
        "MERGE_GATE_INPUT_ARGS": "",
        "MERGE_GATE_IMAGE": "cpu",
    }
    ours = action.gate_environment(given)
    assert ours["HF_TOKEN"] == "hf"
    assert ours["MERGE_GATE_IMAGE"] == "cpu"
    steering = [name for name in ours if name.startswith(("GITHUB_", "ACTIONS_", "INPUT_", "MERGE_GATE_INPUT_"))]
    assert steering == ["GITHUB_WORKSPACE"]
    assert action.gate_environment({**environ, "HF_TOKEN": "of the job"})["HF_TOKEN"] == "of the job"


def test_the_runtime(environ: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert action.choose_runtime("docker", environ) == "docker", "asked for, not tried: the launcher says what is wrong"
    assert action.choose_runtime("auto", {**environ, "MERGE_GATE_IMAGE": "cpu"}) == "native"
    assert capsys.readouterr().out == ""
    assert action.choose_runtime("auto", environ) == "native"
    assert capsys.readouterr().out.startswith("::warning title=merge-gate::no container engine answers")
    assert action.choose_runtime("auto", {**environ, "DOCKER_HOST": "tcp://engine:2376"}) == "docker"


# --- result ----------------------------------------------------------------------------------------------------------


def report(result: str = "pass", *, complete: bool = True, adapters: int = 1, **changed: object) -> dict:
    verdict = {"pass": "passed", "fail": "failed", "error": "error"}[result]
    entry = {"name": "a", "verdict": verdict, "cause": None, "findings": [], "line": 1, "column": 1}
    counts = {"passed": 0, "failed": 0, "error": 0, verdict: adapters}
    return {
        "schema_version": "1.0",
        "complete": complete,
        "result": result,
        "counts": counts,
        "adapters": [entry] * adapters,
        **changed,
    }


@pytest.mark.parametrize(
    ("code", "found", "result", "says"),
    [
        (0, report("pass"), "pass", ""),
        (1, report("fail"), "fail", ""),
        (3, report("error"), "error", ""),
        (0, report("fail"), "error", "exit code 0"),
        (1, report("pass"), "error", "exit code 1"),
        (0, report("pass", complete=False), "error", "unfinished"),
        (1, report("fail", complete=False), "error", "unfinished"),
        (3, report("pass"), "error", "exit code 3"),
        (2, report("pass"), "error", "exit code 2"),
        (-9, report("pass"), "error", "exit code -9"),
        (0, report("pass", adapters=0), "error", "judged nothing"),
        (0, report("pass", schema_version="2.0"), "error", "does not know"),
        (0, report("pass") | {"result": "ok"}, "error", "does not know"),
        (0, report("pass", complete="yes"), "error", "does not know"),
        (0, report("pass", adapters=1) | {"adapters": [{}]}, "error", "does not know"),
        (0, [], "error", "does not know"),
        (0, None, "error", "wrote no report"),
        (0, "{", "error", "cannot be read"),
    ],
)
def test_pass_and_fail_need_exit_code_and_finished_report(tmp_path: Path, code, found, result, says) -> None:
    path = tmp_path / "report.json"
    if found is not None:
        path.write_text(found if isinstance(found, str) else json.dumps(found), encoding="utf-8")
    outcome = action.settle(code, path)
    assert outcome.result == result
    assert says in outcome.problem
    assert bool(says) == bool(outcome.problem)


def test_without_a_report_the_gates_last_words_are_repeated(tmp_path: Path) -> None:
    outcome = action.settle(2, tmp_path / "report.json", ["gate.yml:3:1: unknown key"])
    assert outcome.problem.splitlines()[1:] == ["gate.yml:3:1: unknown key"]


# --- the whole step --------------------------------------------------------------------------------------------------


def outputs(environ: dict[str, str]) -> dict[str, str]:
    text = Path(environ["GITHUB_OUTPUT"]).read_text(encoding="utf-8")
    return {
        name: value for name, _, value in re.findall(r"^([a-z-]+)<<(\S+)\n(.*?)\n\2$", text, re.MULTILINE | re.DOTALL)
    }


def step(environ: dict[str, str], **inputs: str) -> subprocess.Popen[str]:
    given = {
        f"MERGE_GATE_INPUT_{name.upper().replace('-', '_')}": value for name, value in {**DEFAULTS, **inputs}.items()
    }
    return subprocess.Popen(
        [sys.executable, "-I", ROOT / "entrypoint.py", "action"],
        env={**environ, **given},
        cwd=environ["GITHUB_WORKSPACE"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    "inputs", [{"config": "nowhere.yml"}, {"runtime": "docker"}, {"runtime": "docker", "image": "x"}]
)
def test_whatever_goes_wrong_the_outputs_say_error(environ: dict[str, str], inputs: dict[str, str]) -> None:
    process = step(environ, **inputs)
    log, _ = process.communicate(timeout=60)
    assert process.returncode == 0, log
    assert "::error title=merge-gate::" in log
    assert "Traceback" not in log
    said = outputs(environ)
    assert (said["result"], said["failed"], said["counts"]) == ("error", "[]", "{}")
    assert (said["report-path"], said["upload"]) == ("", "false")
    assert "### merge-gate: error" in Path(environ["GITHUB_STEP_SUMMARY"]).read_text()


def test_outputs_that_cannot_be_written_fail_the_step(environ: dict[str, str]) -> None:
    process = step({**environ, "GITHUB_OUTPUT": "/nowhere/output"}, config="nowhere.yml")
    log, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "cannot write /nowhere/output" in log


def test_a_configuration_that_is_wrong_is_named_in_the_annotation(environ: dict[str, str]) -> None:
    process = step(environ, runtime="native")
    log, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    (error,) = [line for line in log.splitlines() if line.startswith("::error")]
    assert "adapters" in error
    assert outputs(environ)["result"] == "error"


def test_a_verdict_of_an_earlier_run_is_not_this_ones(environ: dict[str, str]) -> None:
    old = Path(environ["GITHUB_WORKSPACE"], "out", "report.json")
    old.parent.mkdir()
    old.write_text(json.dumps(report("pass")), encoding="utf-8")
    process = step(environ, runtime="native", output="out")
    process.communicate(timeout=60)
    assert outputs(environ)["result"] == "error"
    assert not old.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_cancelled_job_gets_its_outputs_and_a_true_report(environ: dict[str, str], number: signal.Signals) -> None:
    workspace = Path(environ["GITHUB_WORKSPACE"])
    make_demo(workspace / "demo")
    entries = "".join(f"  - {{name: a{index}, path: ./demo/adapters/good}}\n" for index in range(2500))
    config = f"version: 1\nbase: {{model: ./demo/base}}\nadapters:\n{entries}"
    (workspace / "gate.yml").write_text(config, encoding="utf-8")
    process = step(environ, runtime="native")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[3/"):
            break
    before = time.monotonic()
    process.send_signal(number)
    rest = process.stdout.read()
    assert process.wait(20) == 0
    assert time.monotonic() - before < 7.5
    process.stdout.close()
    assert f"received {number.name}" in rest
    said = outputs(environ)
    assert (said["result"], said["upload"]) == ("error", "true")
    left = json.loads(Path(said["report-path"], "report.json").read_text())
    assert left["complete"] is False
    assert left["counts"]["failed"] == 0


def test_every_input_becomes_a_word() -> None:
    environ = {f"MERGE_GATE_INPUT_{name.upper().replace('-', '_')}": f"of {name}" for name in entrypoint.INPUTS}
    assert entrypoint.words(environ) == [f"--{name}=of {name}" for name in entrypoint.INPUTS]
    assert "hf" not in entrypoint.words({"MERGE_GATE_INPUT_HF_TOKEN": "hf"})
