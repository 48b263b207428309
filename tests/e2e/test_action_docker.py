"""The whole chain: act → action → launcher → container → report → artifact, on a runner with a bare python3."""

import json
from pathlib import Path

import jsonschema
import pytest

from tests.support.e2e.act import TAG
from tests.support.schemas import report_schema

pytestmark = pytest.mark.e2e

TOKEN = "hf_aTokenForTheContainerOnly77"


@pytest.mark.usefixtures("image")
def test_the_chain_is_green_and_red(play, repository: Path, tmp_path: Path, bare, engine: str) -> None:
    """`auto` finds the engine; the SDK comes from the lock by hash; both legs keep their report."""
    environ = {"DOCKER_HOST": engine, "HF_HUB_OFFLINE": "1"}
    run = play(repository, "docker.yml", python=bare, secrets={"HF_TOKEN": TOKEN}, environ=environ)
    assert run.code == 1, run.text
    assert set(run.artifacts) == {"report-green", "report-merge-gate"}
    results = {}
    for name in run.artifacts:
        report = run.report(name)
        jsonschema.validate(report, report_schema())
        results[name] = report["result"]
    assert results == {"report-green": "pass", "report-merge-gate": "fail"}
    assert "runtime docker" in run.text
    assert {record["kvPairs"]["title"].split()[0] for record in run.commands("error")} == {
        "nan", "overflow", "lost-keys", "lfs-pointer", "no-effect",
    }  # fmt: skip
    assert {record["kvPairs"]["file"] for record in run.commands("error")} == {"gate/merge-gate.yml"}
    assert len({record["job"] for record in run.commands("summary")}) == 2
    assert TOKEN not in run.raw
    assert not [name for files in run.artifacts.values() for name, data in files.items() if TOKEN.encode() in data]
    left = sorted(path.name for path in (tmp_path / "run" / "actions").rglob("merge-gate-*") if path.is_dir())
    assert not [name for name in left if "sdk" in name or "hf" in name], "the SDK and the cache are gone"


def test_every_input_reaches_the_container_or_its_default_does(
    play, repository: Path, tmp_path: Path, bare, engine: str, rogue: str, podman
) -> None:
    home = tmp_path / "run" / "home"
    for shelf in ("shelf", "other shelf"):
        (home / shelf / "base").mkdir(parents=True)
    (repository / "gate" / "facts.yml").write_text(f"facts notes.txt {home / 'shelf'}", encoding="utf-8")
    (repository / "gate" / "late.yml").write_text("sleep 600", encoding="utf-8")
    environ = {"DOCKER_HOST": engine, "HF_HUB_OFFLINE": "1"}
    run = play(repository, "every-input.yml", python=bare, secrets={"HF_TOKEN": TOKEN}, environ=environ)
    seen = run.outputs("seen")
    assert seen["RESULTS"] == "pass pass error", run.text
    assert seen["OTHERS"] == "error error"
    given = [json.loads(line.partition("facts: ")[2]) for line in run.lines() if line.startswith("facts: ")]
    every, empty = given
    assert every == {
        "shm": 32 << 20, "memory": str(512 << 20), "cpus": "150000", "debug": "1", "cache": str(home / "cache"),
        "shelf": ["base"], "shelf is writable": False,
        "words": ["run", "gate/facts.yml", "--output", str(home / "report"), "--device", "cpu",
                  "--cache", str(home / "verdicts"), "--publish", str(home / "merged"), "--shard", "2/4",
                  "--only", "a"],
    }  # fmt: skip
    assert seen["REPORT"] == str(home / "report")
    assert seen["NAME"] == "every input"
    assert seen["DIGEST"] == run.digests["every input"]
    assert seen["IMAGE"] in json.loads(podman("image", "inspect", rogue))[0]["RepoDigests"]
    assert (empty["shelf"], empty["debug"]) == ([], None)
    assert empty["memory"] != every["memory"]
    assert empty["words"][-2:] == ["--device", "auto"]
    for part in ("0.02 min", f"localhost/nowhere:{TAG}", "`pull` is never", rogue, "cannot be pulled"):
        assert part in run.text


@pytest.mark.usefixtures("image")
def test_a_gpu_that_is_not_there_is_an_error(play, repository: Path, engine: str) -> None:
    run = play(repository, "docker-gpu.yml", environ={"DOCKER_HOST": engine})
    assert run.code == 1, run.text
    (error,) = [record for record in run.commands("error") if record["kvPairs"].get("title") == "merge-gate"]
    assert "GPUs (all)" in error["arg"]
    assert run.outputs("gate")["result"] == "error"
    assert json.loads(run.outputs("gate")["counts"]) == {}
    assert run.artifacts == {}


@pytest.mark.usefixtures("image")
def test_a_model_is_published_and_verified_natively_and_inside(play, repository: Path, engine: str) -> None:
    run = play(repository, "publish.yml", environ={"DOCKER_HOST": engine, "HF_HUB_OFFLINE": "1"})
    assert run.code == 0, run.text
    seen = [record for record in run.commands("set-output") if record.get("stepID") == ["seen"]]
    results = [record["arg"] for record in seen if record["name"] == "RESULTS"]
    assert results == ["pass pass fail failure", "pass pass  skipped"]
    assert [record["arg"] for record in seen if record["name"] == "IMAGES"] == ["false false", "true true"]
    native, docker = (json.loads(record["arg"]) for record in seen if record["name"] == "PUBLISHED")
    for (model,) in (native, docker):
        assert (model["name"], model["dtype"]) == ("good", "preserve")
        assert model["directory"].endswith("/merged/good")
        assert len(model["sha256"]) == 64
