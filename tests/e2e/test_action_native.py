"""The action in the environment of its job: real workflow files, run by act."""

import json
import shutil
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.support.e2e.act import ActRun
from tests.support.schemas import report_schema

pytestmark = pytest.mark.e2e

BROKEN = ["nan", "overflow", "lost-keys", "lfs-pointer", "no-effect"]
TOKEN = "hf_thisTokenMustStayHidden0123456789"


def checked_report(run: ActRun, name: str | None = None) -> dict:
    report = run.report(name)
    jsonschema.validate(report, report_schema())
    assert report["complete"] is True
    return report


def test_a_repository_that_runs_its_own_copy_is_green(play, own_repository: Path) -> None:
    run = play(own_repository, "local-green.yml")
    assert run.code == 0, run.text
    seen = run.outputs("seen")
    assert (seen["RESULT"], seen["FAILED"]) == ("pass", "[]")
    assert json.loads(seen["COUNTS"]) == {"passed": 1, "failed": 0, "error": 0}
    assert seen["URL"].endswith(seen["ARTIFACT"])
    assert seen["ARTIFACT"]
    report = checked_report(run)
    assert report["result"] == "pass"
    assert report["config"]["path"] == "gate/green.yml"
    assert run.commands("error") == []
    summary = run.commands("summary")[0]
    assert "`good`" in summary["content"]


def test_a_red_run_keeps_its_report(play, own_repository: Path) -> None:
    run = play(own_repository, "local-red.yml")
    assert run.code == 1, run.text
    seen = run.outputs("seen")
    assert seen["RESULT"] == "fail"
    assert sorted(json.loads(seen["FAILED"])) == sorted(BROKEN)
    assert json.loads(seen["COUNTS"])["failed"] == len(BROKEN)
    report = checked_report(run)
    assert report["result"] == "fail"
    (name,) = run.artifacts
    assert set(run.artifacts[name]) >= {"report.json", "summary.md"}
    assert run.artifacts[name]["summary.md"].decode() in run.commands("summary")[0]["content"]
    causes = {adapter["name"]: adapter["cause"] for adapter in report["adapters"] if adapter["verdict"] == "failed"}
    annotated = {}
    for record in run.commands("error"):
        title, place = record["kvPairs"]["title"], record["kvPairs"]
        annotated[title.split()[0]] = title.partition(": ")[2]
        assert place["file"] == "gate/merge-gate.yml"
        line = (own_repository / "gate" / "merge-gate.yml").read_text().splitlines()[int(place["line"]) - 1]
        assert title.split()[0] in line
        assert "\n" in record["arg"], "a hint follows the message"
    assert annotated == causes
    lfs = next(record["arg"] for record in run.commands("error") if "lfs-pointer" in record["kvPairs"]["title"])
    assert "\n" in lfs, "line breaks arrive decoded"
    assert "lfs: true" in lfs, "and so does the colon"


def test_a_consumer_that_only_wants_to_know(play, repository: Path) -> None:
    """fail-on: never, auto falls back to native where no engine answers; and the token is nowhere."""
    run = play(
        repository, "consumer.yml", secrets={"HF_TOKEN": TOKEN}, environ={"DOCKER_HOST": "unix:///nowhere/docker.sock"}
    )
    assert run.code == 0, run.text
    assert run.outputs("seen")["RESULT"] == "fail"
    assert list(run.artifacts) == ["release-report"]
    checked_report(run)
    assert any(record["kvPairs"].get("title") == "merge-gate" for record in run.commands("warning"))
    assert TOKEN not in run.raw
    assert not [name for name, data in run.artifacts["release-report"].items() if TOKEN.encode() in data]


def test_two_legs_of_a_matrix_upload_two_artifacts(play, repository: Path) -> None:
    run = play(repository, "matrix.yml")
    assert run.code == 1, run.text
    assert len(run.artifacts) == 2
    assert {checked_report(run, name)["result"] for name in run.artifacts} == {"pass", "fail"}


def test_wrong_inputs_are_all_named_at_once(play, repository: Path) -> None:
    run = play(repository, "inputs.yml")
    assert run.code == 1, run.text
    seen = run.outputs("seen")
    assert (seen["RESULT"], seen["FAILED"], seen["COUNTS"], seen["REPORT"]) == ("error", "[]", "{}", "")
    (error,) = [record for record in run.commands("error") if record["kvPairs"].get("title") == "merge-gate"]
    for name in ("config", "runtime", "device", "fail-on", "upload-report", "retention-days", "artifact-name", "args"):
        assert f"{name}: got" in error["arg"], name
    assert run.artifacts == {}
    assert "Traceback" not in run.text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("version: 1\nadapters: []\n", "adapters"),
        ("version: 1\nadaptors: [./adapters/good]\n", "adaptors"),
        ("version: 1\nbase: {model: nobody/nothing}\nadapters: [./adapters/good]\n", "nobody/nothing"),
    ],
)
def test_what_could_not_be_judged_is_red_and_says_why(play, repository: Path, text: str, says: str) -> None:
    """Exit codes 2 and 3 of the gate; fail-on: never does not hide them."""
    (repository / "gate" / "merge-gate.yml").write_text(text, encoding="utf-8")
    run = play(repository, "consumer.yml", environ={"HF_HUB_OFFLINE": "1", "DOCKER_HOST": "unix:///nowhere"})
    assert run.code == 1, run.text
    assert run.outputs("seen")["RESULT"] == "error"
    assert says in run.text
    assert "Traceback" not in run.text
    if "nobody" not in text:
        assert {(record["kvPairs"].get("file"), record["kvPairs"].get("line")) for record in run.commands("error")} > {
            ("gate/merge-gate.yml", "2")
        }


HOSTILE = ["::add-path::/evil", "a##[add-path]/evil", "%0A::debug::b", "::error file=x::y", " ::warning::z"]
REFUSED = ["x\n::set-output name=result::pass", "c\r::notice::d"]


@pytest.mark.parametrize(("names", "result"), [(HOSTILE, "fail"), (REFUSED, "error")])
def test_hostile_names_and_files_speak_to_nobody(play, repository: Path, names: list[str], result: str) -> None:
    """No line of the log that comes from an adapter is a command, whether or not the runner heeds the fence.

    Names with control characters are refused with the configuration, and so repeated in the annotation.
    """
    gate = repository / "gate"
    adapters = []
    for index, name in enumerate(names):
        directory = gate / "adapters" / f"hostile{index}"
        shutil.copytree(gate / "adapters" / ("nan" if index % 2 else "good"), directory)
        config = json.loads((directory / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = f"{name}\n::error::from the config"
        config["target_modules"] = [f"\n::warning::{name}"] if index == 2 else config["target_modules"]
        (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        adapters.append({"path": f"./adapters/hostile{index}", "name": name})
    shutil.copytree(gate / "adapters" / "lfs-pointer", gate / "adapters" / "::warning::evil")
    adapters.append({"path": "./adapters/::warning::evil"})
    text = yaml.safe_dump({"version": 1, "base": {"model": "./base"}, "adapters": adapters})
    (gate / "hostile.yml").write_text(text, encoding="utf-8")
    run = play(repository, "hostile.yml")
    assert run.code == 1, run.text
    assert run.outputs("gate")["result"] == result
    fence = [record["arg"] for record in run.commands("stop-commands")]
    ours = {"stop-commands", "error", "set-output", "summary", *fence}
    assert {record["command"] for record in run.records if "command" in record} <= ours
    assert run.commands("error")
    for record in run.commands("error"):
        # act drops a property whose value has an equals sign; GitHub splits at the first one only.
        assert record["kvPairs"].get("title") or record["kvPairs"].get("file") == "gate/hostile.yml", record
        assert not set(record["kvPairs"]) - {"file", "line", "col", "title"}
    for line in run.lines():
        assert not line.lstrip().startswith("::") or line.split("::")[1].split()[0] in ours, line
        assert "##[" not in line, line
