"""The whole chain: act → action → launcher → container → report → artifact, on a runner with a bare python3."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import jsonschema
import pytest

from merge_gate.report.schema import report_schema
from tests.e2e.act import make_repository, run_act

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.e2e

TOKEN = "hf_aTokenForTheContainerOnly77"


@pytest.mark.usefixtures("image")
def test_the_chain_is_green_and_red(tool, repository: Path, tmp_path: Path, bare, released, engine: str) -> None:
    """`auto` finds the engine; the SDK comes from the lock by hash; both legs keep their report."""
    make_repository(repository, "docker.yml")
    run = run_act(
        tool("act"),
        repository,
        "docker.yml",
        tmp_path / "run",
        python=bare,
        consumer_of=released,
        secrets={"HF_TOKEN": TOKEN},
        environ={"DOCKER_HOST": engine, "HF_HUB_OFFLINE": "1"},
    )
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


@pytest.mark.usefixtures("image")
def test_a_gpu_that_is_not_there_is_an_error(
    tool, repository: Path, tmp_path: Path, installed, released, engine
) -> None:
    make_repository(repository, "docker-gpu.yml")
    run = run_act(
        tool("act"),
        repository,
        "docker-gpu.yml",
        tmp_path / "run",
        python=installed,
        consumer_of=released,
        environ={"DOCKER_HOST": engine},
    )
    assert run.code == 1, run.text
    (error,) = [record for record in run.commands("error") if record["kvPairs"].get("title") == "merge-gate"]
    assert "cannot give the container the GPUs asked for (all)" in error["arg"]
    assert run.outputs("gate")["result"] == "error"
    assert json.loads(run.outputs("gate")["counts"]) == {}
    assert run.artifacts == {}
