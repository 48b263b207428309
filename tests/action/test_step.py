"""The action's first step: what it asks of its inputs, when it says pass, and what it leaves behind."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from merge_gate._internal.errors import UsageError
from merge_gate._internal.locked_directory import locked_directory
from merge_gate.action import step as action
from merge_gate.action.docker import leftovers
from merge_gate.action.inputs import read_inputs
from merge_gate.action.outcome import StepOutcome
from merge_gate.demo import make_demo
from merge_gate.report.stored.report_files import FORMATS, write_report
from tests.support.action.stand_in import BREAK_OFF, Container, engine_at
from tests.support.action.step_files import asked, report
from tests.support.command import PATIENCE_S
from tests.support.reports import EMPTY, PASS
from tests.support.wording import Wording

ROOT = Path(__file__).resolve().parents[2]


# --- environment -----------------------------------------------------------------------------------------------------


def test_the_gate_gets_the_hubs_token_and_none_of_the_runners(environ: dict[str, str]) -> None:
    runners = {"ACTIONS_RUNTIME_TOKEN": "a", "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "b", "GITHUB_TOKEN": "c", "INPUT_X": "d"}
    given = {**asked(environ, hf_token="hf", args=""), **runners, "MERGE_GATE_IMAGE": "cpu"}
    ours = action.gate_environment(given)
    assert (ours["HF_TOKEN"], ours["MERGE_GATE_IMAGE"]) == ("hf", "cpu")
    steering = [name for name in ours if name.startswith(("GITHUB_", "ACTIONS_", "INPUT_", "MERGE_GATE_INPUT_"))]
    assert steering == ["GITHUB_WORKSPACE"]
    run = {"GITHUB_REPOSITORY": "acme/adapters", "GITHUB_RUN_ID": "7", "GITHUB_SHA": "0" * 40}
    ours = action.gate_environment({**given, **run, "MERGE_GATE_CACHE_KEY": "k" * 16})
    assert ours["MERGE_GATE_COMMIT"] == "0" * 40
    assert (ours["MERGE_GATE_PLACE"], ours["MERGE_GATE_CACHE_KEY"]) == ("acme/adapters run 7", "k" * 16)
    assert action.gate_environment({**environ, "HF_TOKEN": "of the job"})["HF_TOKEN"] == "of the job"


def test_the_runtime(environ: dict[str, str], capsys: pytest.CaptureFixture[str], wording: Wording) -> None:
    assert action.choose_runtime("docker", environ) == "docker", "asked for, not tried: the launcher says what is wrong"
    assert action.choose_runtime("auto", {**environ, "MERGE_GATE_IMAGE": "cpu"}) == "native"
    assert capsys.readouterr().out == ""
    assert action.choose_runtime("auto", environ) == "native"
    (warning,) = annotations("warning", capsys.readouterr().out)
    wording(warning)
    assert action.choose_runtime("auto", {**environ, "DOCKER_HOST": "tcp://engine:2376"}) == "docker"


@pytest.mark.parametrize("token", ["hf_x\n", " hf_x\r\n", "hf_x"])
def test_a_token_is_the_word_that_is_masked(environ: dict[str, str], token: str) -> None:
    assert action.gate_environment({**environ, "MERGE_GATE_INPUT_HF_TOKEN": token})["HF_TOKEN"] == "hf_x"


def test_a_token_of_several_words_is_refused_and_not_shown(environ: dict[str, str], wording: Wording) -> None:
    with wording.of(UsageError) as raised:
        action.gate_environment({**environ, "MERGE_GATE_INPUT_HF_TOKEN": "hf_x\nhf_y"})
    assert "hf_x" not in raised.value.message


def test_a_runner_that_debugs_debugs_the_gate(environ: dict[str, str]) -> None:
    assert action.gate_environment({**environ, "RUNNER_DEBUG": "1"})["MERGE_GATE_DEBUG"] == "1"
    assert "MERGE_GATE_DEBUG" not in action.gate_environment(environ)


def test_windows_is_a_sentence(wording: Wording) -> None:
    with wording.of(UsageError):
        action._check_system("nt")


# --- the whole step --------------------------------------------------------------------------------------------------


FILES = ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")


def annotations(level: str, log: str) -> list[str]:
    """The texts of the step's own annotations of this level."""
    return re.findall(rf"^::{level} title=merge-gate::(.*)$", log, re.MULTILINE)


def outputs(environ: dict[str, str]) -> dict[str, str]:
    text = Path(environ["GITHUB_OUTPUT"]).read_text(encoding="utf-8")
    return {
        name: value for name, _, value in re.findall(r"^([a-z-]+)<<(\S+)\n(.*?)\n\2$", text, re.MULTILINE | re.DOTALL)
    }


def step(environ: dict[str, str], **inputs: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-I", ROOT / "entrypoint.py", "action"],
        env=asked(environ, **inputs),
        cwd=environ["GITHUB_WORKSPACE"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_step(environ: dict[str, str], **inputs: str) -> str:
    """Run the step, and return its log."""
    process = step(environ, **inputs)
    log, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, log
    return log


@pytest.mark.parametrize(
    "inputs", [{"config": "nowhere.yml"}, {"runtime": "docker"}, {"runtime": "docker", "image": "x"}]
)
def test_whatever_goes_wrong_the_outputs_say_error(environ: dict[str, str], inputs: dict[str, str]) -> None:
    log = run_step(environ, **inputs)
    assert annotations("error", log)
    assert "Traceback" not in log
    said = outputs(environ)
    assert (said["result"], said["failed"], said["counts"]) == ("error", "[]", "{}")
    assert (said["report-path"], said["upload"]) == ("", "false")
    assert (said["passed"], said["conclusion"]) == ("[]", "failure")
    assert said["headline"].startswith("merge-gate ERROR: ")
    assert {said[name] for name in ("report-json", "report-html", "sarif", "summary")} == {""}
    assert Path(environ["GITHUB_STEP_SUMMARY"]).read_text().startswith("### merge-gate: error\n")


def test_a_misplaced_token_is_in_no_output(environ: dict[str, str]) -> None:
    log = run_step(environ, hf_token="hf_s3cr3t", adapters="hf_s3cr3t")
    assert "adapters: got the token" in log
    assert "s3cr3t" not in log + "".join(Path(environ[name]).read_text() for name in FILES)
    assert outputs(environ)["result"] == "error"


def test_outputs_that_cannot_be_written_fail_the_step(environ: dict[str, str]) -> None:
    process = step({**environ, "GITHUB_OUTPUT": "/nowhere/output"}, config="nowhere.yml")
    log, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "/nowhere/output" in log


class Crashing(dict[str, str]):
    """An environment with an input that cannot be read."""

    def get(self, name: str, *default: Any) -> Any:
        return 1 / 0 if name == "MERGE_GATE_INPUT_CONFIG" else super().get(name, *default)


def test_a_crash_of_the_step_itself_is_an_error_with_outputs(environ, capsys) -> None:
    assert action.main(Crashing(environ)) == 0
    (error,) = annotations("error", capsys.readouterr().out)
    assert "ZeroDivisionError: division by zero" in error
    assert outputs(environ)["result"] == "error"


def fail_one(inside: Container) -> int:
    """A gate inside whose only adapter fails."""
    output = Path(inside.asked["Cmd"][inside.asked["Cmd"].index("--output") + 1])
    (inside.outside(output) / "report.json").write_text(json.dumps(report("fail")), encoding="utf-8")
    (inside.outside(output) / "summary.md").write_text("## the gate's own", encoding="utf-8")
    return 1


def test_a_container_that_fails_an_adapter(environ: dict[str, str], tmp_path: Path) -> None:
    with engine_at(tmp_path / "engine.sock", fail_one) as engine:
        orphan = Container("f" * 12, "merge-gate-orphan", {"Labels": {**leftovers.LABEL, leftovers._UNTIL: "1"}})
        engine.containers[orphan.id] = orphan
        engine.wrong["DELETE /containers/f+"] = [(409, {"message": "busy"})] * 6
        log = run_step({**environ, "DOCKER_HOST": engine.address}, image="merge-gate:test", gpus="none")
    (started,) = re.findall(r"^merge-gate: runtime (.*)$", log, re.MULTILINE)
    assert started.startswith("docker, ")
    (warning,) = annotations("warning", log)
    assert orphan.id in warning
    assert "::error file=gate.yml,line=1" in log
    said = outputs(environ)
    assert (said["result"], said["failed"], said["image"], said["upload"]) == ("fail", '["a"]', "sha256:1", "true")
    assert (said["report-json"], said["summary"]) == tuple(
        f"{said['report-path']}/{name}" for name in ("report.json", "summary.md")
    )
    assert (said["headline"], said["conclusion"], said["reason"]) == (
        "merge-gate FAIL",
        "failure",
        "the job fails: 1 failed",
    )
    assert Path(environ["GITHUB_STEP_SUMMARY"]).read_text() == "## the gate's own\n"


def test_a_container_that_is_lost_keeps_what_was_judged(environ: dict[str, str], tmp_path: Path) -> None:
    with engine_at(tmp_path / "engine.sock", fail_one) as engine:
        engine.before["POST /containers/.*/wait"] = lambda: engine.container.ended.wait(30)
        engine.wrong["POST /containers/.*/wait"] = [BREAK_OFF]
        log = run_step({**environ, "DOCKER_HOST": engine.address}, image="merge-gate:test", gpus="none")
    (lost,) = annotations("error", log)
    said = outputs(environ)
    assert (said["result"], said["failed"], said["report-path"] != "") == ("error", '["a"]', True)
    summary = Path(environ["GITHUB_STEP_SUMMARY"]).read_text()
    assert summary.startswith(f"### merge-gate: error\n\n    {lost.partition('%0A')[0]}\n")
    assert summary.endswith("## the gate's own\n")


def test_a_wrong_configuration_is_named_in_the_annotation(environ: dict[str, str]) -> None:
    log = run_step(environ, runtime="native")
    at_the_line, whole = [line for line in log.splitlines() if line.startswith("::error")]
    assert at_the_line.startswith("::error file=gate.yml,line=1,col=1,")
    assert "adapters" in at_the_line
    assert "adapters" in whole
    assert outputs(environ)["result"] == "error"


def test_a_verdict_of_an_earlier_run_is_not_this_ones(environ: dict[str, str]) -> None:
    out = Path(environ["GITHUB_WORKSPACE"], "out")
    write_report(PASS, out)
    log = run_step(environ, runtime="native", output="out")
    assert outputs(environ)["result"] == "error"
    assert outputs(environ)["upload-path"] == ""
    assert {path.name for path in out.iterdir()} == {"previous"}
    assert (out / "previous" / "report.json").read_text() == FORMATS["report.json"](PASS)
    assert "wrote no report" in log


@pytest.mark.attempt("D2c", "the action's verify with the output of a run", "error, and the run's report stays")
@pytest.mark.parametrize("runtime", ["native", "docker"])
def test_a_verification_leaves_the_report_of_a_run(environ: dict[str, str], runtime: str) -> None:
    workspace = Path(environ["GITHUB_WORKSPACE"])
    (workspace / "model").mkdir()
    write_report(PASS, workspace / "out")
    log = run_step(environ, runtime=runtime, config="merge-gate.yml", verify="model", output="out")
    (error,) = annotations("error", log)
    assert "report of a run" in error
    assert outputs(environ)["result"] == "error"
    assert {path.name: path.read_text() for path in (workspace / "out").iterdir()} == {
        name: render(PASS) for name, render in FORMATS.items()
    }


@pytest.mark.parametrize("runtime", ["native", "docker"])
def test_files_of_other_tools_stay_as_they_are(environ: dict[str, str], runtime: str) -> None:
    """`output: .` is the checkout, in which a test runner may have left its own junit.xml."""
    workspace = Path(environ["GITHUB_WORKSPACE"])
    (workspace / "junit.xml").write_text("<testsuites/>", encoding="utf-8")
    write_report(PASS, workspace, formats=["report.json"])
    log = run_step(environ, runtime=runtime, output=".")
    (error,) = annotations("error", log)
    assert "junit.xml" in error
    assert outputs(environ)["result"] == "error"
    assert (outputs(environ)["upload"], outputs(environ)["report-path"]) == ("false", "")
    assert (workspace / "junit.xml").read_text() == "<testsuites/>"
    assert (workspace / "report.json").read_text() == FORMATS["report.json"](PASS)


def test_a_run_in_a_container_replaces_the_previous_report(environ: dict[str, str], tmp_path: Path) -> None:
    out = Path(environ["GITHUB_WORKSPACE"], "out")
    write_report(EMPTY, out / "previous")
    write_report(PASS, out)
    with engine_at(tmp_path / "engine.sock", fail_one) as engine:
        given = {**environ, "DOCKER_HOST": engine.address}
        log = run_step(given, image="merge-gate:test", gpus="none", output="out")
    assert {path.name for path in out.iterdir()} == {"report.json", "summary.md", "previous"}, log
    assert (out / "previous" / "report.json").read_text() == FORMATS["report.json"](PASS)
    assert sorted(outputs(environ)["upload-path"].splitlines()) == [str(out / "report.json"), str(out / "summary.md")]


def test_a_second_run_does_not_mix_its_report_with_this_ones(environ: dict[str, str]) -> None:
    output = Path(environ["GITHUB_WORKSPACE"], "out")
    output.mkdir()
    with locked_directory(output):
        (output / "report.json").write_text("of the other run", encoding="utf-8")
        log = run_step(environ, runtime="native", output="out")
    (error,) = annotations("error", log)
    assert str(output) in error
    assert (output / "report.json").read_text() == "of the other run"
    assert outputs(environ)["report-path"] == ""


@pytest.mark.parametrize("blocked", ["temp", "output"])
def test_a_directory_that_cannot_be_made_is_a_sentence(environ: dict[str, str], blocked: str) -> None:
    place = Path(environ["GITHUB_WORKSPACE"], "file")
    place.touch()
    changed = {"RUNNER_TEMP": str(place)} if blocked == "temp" else {}
    log = run_step({**environ, **changed}, runtime="native", **({"output": "file/out"} if blocked == "output" else {}))
    (error,) = annotations("error", log)
    assert os.strerror(errno.ENOTDIR) in error
    assert NotADirectoryError.__name__ not in log, "an accident names its exception"


def publish(environ: dict[str, str], outcome: StepOutcome, **inputs: str) -> None:
    """Do what the step does with an outcome, as if its run had these inputs, and `out` as its output."""
    read = read_inputs(asked(environ, output="out", **inputs))
    read.run.output.mkdir(exist_ok=True)
    assert action._publish(read, outcome, action._Messages(list), environ) == 0


def test_a_summary_that_is_a_link_is_not_read(environ: dict[str, str], tmp_path: Path) -> None:
    output = Path(environ["GITHUB_WORKSPACE"], "out")
    output.mkdir()
    (tmp_path / "secret").write_text("of the host", encoding="utf-8")
    (output / "summary.md").symlink_to(tmp_path / "secret")
    inputs = read_inputs(asked(environ, output="out"))
    assert action._summary(inputs, StepOutcome("pass", report("pass"))) == ""


@pytest.mark.parametrize(
    ("head", "token", "verdict", "explains"),
    [
        ("stranger/adapters", "", "error", True),
        ("stranger/adapters", "hf_x", "error", False),
        ("stranger/adapters", "", "pass", False),
        ("acme/adapters", "", "error", False),
    ],
)
def test_a_fork_without_a_token_is_told_why_nothing_was_judged(
    environ: dict[str, str], capsys: pytest.CaptureFixture[str], wording: Wording,
    head: str, token: str, verdict: str, explains: bool,
) -> None:  # fmt: skip
    event = Path(environ["RUNNER_TEMP"], "event.json")
    event.write_text(json.dumps({"pull_request": {"number": 5, "head": {"repo": {"full_name": head}}}}))
    given = {
        **environ, "GITHUB_EVENT_NAME": "pull_request", "GITHUB_EVENT_PATH": str(event), "HF_TOKEN": token,
        "GITHUB_REPOSITORY": "acme/adapters",
    }  # fmt: skip
    wanted = {"comment": "true", "upload_sarif": "true", "fail_on_not_judged": "false"}
    publish(given, StepOutcome(verdict, report(verdict)), **wanted)
    warnings = annotations("warning", capsys.readouterr().out)
    assert bool(warnings) is explains
    summary = Path(environ["GITHUB_STEP_SUMMARY"]).read_text()
    assert summary.startswith("> This run is a pull request from a fork.") is explains
    if explains:
        wording(warnings[0])
    said, own = outputs(environ), str(head == "acme/adapters").lower()
    assert (said["conclusion"], said["comment"], said["upload-sarif"]) == ("success", own, own)


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({}, "file=gate.yml,line=1,col=1,title"),
        ({"config": "", "verify": ".", "adapters": "acme/lora"}, "title"),
        ({"config": "", "adapters": "acme/lora"}, "title"),
    ],
)
def test_only_a_configuration_is_annotated_at_its_lines(environ, capsys, given, place) -> None:
    publish(environ, StepOutcome("fail", report("fail")), **given)
    assert f"::error {place}=a failed" in capsys.readouterr().out


@pytest.mark.parametrize(("fail_on", "conclusion"), [("warning", "failure"), ("failed", "success")])
def test_a_warning_that_fails_the_job_is_annotated(environ, capsys, fail_on, conclusion) -> None:
    found = report("pass")
    warning = {"check": "headroom", "severity": "warning", "message": "m", "hint": None, "tensor": None}
    found["adapters"][0]["findings"] = [warning]
    publish(environ, StepOutcome("pass", found), fail_on=fail_on)
    line = "::warning file=gate.yml,line=1,col=1,title=a passed%3A headroom::m"
    assert (line in capsys.readouterr().out) is (fail_on == "warning")
    assert outputs(environ)["conclusion"] == conclusion


@pytest.mark.parametrize(("problem", "passed"), [("", '["a"]'), ("the report was tampered with", "[]")])
def test_without_a_verdict_nothing_has_passed(environ: dict[str, str], problem: str, passed: str) -> None:
    out = Path(environ["GITHUB_WORKSPACE"], "out")
    out.mkdir()
    (out / "summary.md").write_text("all is well", encoding="utf-8")
    publish(environ, StepOutcome("error" if problem else "pass", report("pass"), problem))
    said = outputs(environ)
    assert (said["passed"], bool(said["summary"])) == (passed, not problem)


def test_a_server_without_artifacts_keeps_the_report(environ, capsys) -> None:
    on_premises = {**environ, "GITHUB_SERVER_URL": "https://github.acme.example"}
    publish(on_premises, StepOutcome("pass", report("pass")))
    assert outputs(environ)["upload"] == "false"
    assert outputs(environ)["report-path"] == str(Path(environ["GITHUB_WORKSPACE"], "out"))
    (warning,) = annotations("warning", capsys.readouterr().out)
    assert "github.acme.example" in warning


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
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
    assert process.wait(PATIENCE_S) == 0
    assert time.monotonic() - before < 7.5
    process.stdout.close()
    assert number.name in rest
    said = outputs(environ)
    assert (said["result"], said["upload"]) == ("error", "true")
    left = json.loads(Path(said["report-path"], "report.json").read_text())
    assert left["complete"] is False
    assert left["counts"]["failed"] == 0
