"""Containers whose code is hostile: nothing that they plant is followed, waited for, read whole, or uploaded."""

import json
import time
from pathlib import Path

import pytest

from merge_gate.action.docker.container import ContainerRun
from merge_gate.action.docker.launcher import run_in_container

pytestmark = pytest.mark.e2e

SECRET = "what only the runner may read"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(SECRET, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["report.json", "summary.md"])
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("link", "a symbolic link"),
        ("endless", "a symbolic link"),
        ("pipe", "a named pipe"),
        ("sparse", "4294967296 bytes"),
        ("directory", "a directory"),
    ],
)
def test_what_stands_in_place_of_a_file_is_refused(
    rogue_run: ContainerRun, secret: Path, kind: str, name: str, says: str
) -> None:
    rogue_run.config.write_text(f"{kind} {name} {secret}", encoding="utf-8")
    refused: list[str] = []
    before = time.monotonic()
    assert run_in_container(rogue_run, print, lambda kind, text: None if kind == "image" else refused.append(text)) == 0
    assert time.monotonic() - before < 60
    (sentence,) = refused
    assert sentence.startswith(name)
    assert says in sentence
    others = {"report.json", "summary.md"} - {name}
    assert {path.name for path in rogue_run.output.iterdir()} == others
    assert list((rogue_run.output.parent / "temp").iterdir()) == [], "folders that nobody may enter are gone as well"


@pytest.mark.parametrize("kind", ["link", "pipe", "sparse"])
def test_other_names_do_not_exist(rogue_run: ContainerRun, secret: Path, kind: str) -> None:
    rogue_run.config.write_text(f"{kind} notes.txt {secret}", encoding="utf-8")
    assert run_in_container(rogue_run, print) == 0
    assert {path.name for path in rogue_run.output.iterdir()} == {"report.json", "summary.md"}


@pytest.mark.parametrize("kind", ["device", "hardlink"])
def test_what_the_engine_itself_keeps_it_from(rogue_run: ContainerRun, secret: Path, kind: str) -> None:
    """No capability to make a device, and no way to give a file of another mount a second name."""
    rogue_run.config.write_text(f"{kind} summary.md {secret}", encoding="utf-8")
    log = bytearray()
    assert run_in_container(rogue_run, log.extend) == 0
    assert b"refused by the engine" in log
    assert {path.name for path in rogue_run.output.iterdir()} == {"report.json"}


@pytest.mark.parametrize(
    ("plant", "result", "files"),
    [
        ("link notes.txt", "pass", {"report.json", "summary.md"}),
        ("link summary.md", "error", {"report.json"}),
        ("pipe report.json", "error", set()),
        ("sparse summary.md", "error", {"report.json"}),
    ],
)
def test_the_artifact_holds_nothing_of_the_runner(
    play, repository: Path, bare, engine: str, rogue: str, secret: Path, plant, result, files
) -> None:
    """The whole chain under act: the artifact unzipped and looked at, the job summary and the log besides."""
    (repository / "gate" / "rogue.yml").write_text(f"{plant} {secret}", encoding="utf-8")
    run = play(repository, "rogue.yml", python=bare, environ={"DOCKER_HOST": engine, "HF_HUB_OFFLINE": "1"})
    assert run.code == (0 if result == "pass" else 1), run.text
    assert run.outputs("gate")["result"] == result
    assert {name for archive in run.artifacts.values() for name in archive} == files
    assert not [data for archive in run.artifacts.values() for data in archive.values() if SECRET.encode() in data]
    assert SECRET not in run.raw
    if result == "error":
        assert any("tampered with" in record["arg"] for record in run.commands("error"))
        assert json.loads(run.outputs("gate")["failed"]) == []
