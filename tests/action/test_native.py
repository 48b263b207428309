"""The gate as a child process of the step."""

import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from merge_gate._internal.errors import LauncherError, UsageError
from merge_gate.action import step
from merge_gate.action.docker.container import ContainerRun
from tests.support.command import alive
from tests.support.wording import Wording


@pytest.fixture
def run(demo: Path, tmp_path: Path) -> ContainerRun:
    return ContainerRun(
        config=demo / "merge-gate.yml",
        output=tmp_path / "out",
        workspace=demo,
        arguments=("--only", "good"),
        environ={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
    )


def test_it_runs_and_what_lies_in_the_workspace_is_not_imported(run: ContainerRun, tmp_path: Path) -> None:
    workspace = shutil.copytree(run.workspace, tmp_path / "workspace")
    for name in ("torch", "merge_gate", "json"):
        (workspace / f"{name}.py").write_text("raise SystemExit(99)", encoding="utf-8")
    log, environ = bytearray(), {**run.environ, "PYTHONPATH": str(workspace)}
    here = replace(run, workspace=workspace, config=workspace / "merge-gate.yml", environ=environ)
    assert step.run_here(here, log.extend) == 0, log.decode()
    assert (run.output / "report.json").is_file()


@pytest.mark.parametrize(
    ("gpus", "device", "visible", "told"),
    [
        ("auto", "auto", None, "auto"),
        ("none", "auto", "", "auto"),
        ("all", "auto", None, "cuda"),
        ("0,1", "auto", "0,1", "cuda"),
        ("1", "cuda:0", "1", "cuda:0"),
        ("nvidia.com/gpu=0,nvidia.com/gpu=1", "auto", "0,1", "cuda"),
        ("nvidia.com/gpu=all", "auto", None, "cuda"),
        ("auto", "cpu", None, "cpu"),
    ],
)
def test_gpus_are_narrowed_by_cudas_own_variable(run: ContainerRun, gpus, device, visible, told) -> None:
    environ, device = step.gpus_and_device(replace(run, gpus=gpus, device=device))
    assert environ.get("CUDA_VISIBLE_DEVICES") == visible
    assert device == told


@pytest.mark.attempt("A04b", "native runtime: the YAML of a pull request publishes outside of the workspace", "exit 2")
@pytest.mark.parametrize("target", ["../outside", "link", "inside"])
def test_models_stay_in_the_workspace(run: ContainerRun, tmp_path: Path, target: str) -> None:
    (tmp_path / "outside").mkdir()
    workspace = tmp_path / "workspace"
    shutil.copytree(run.workspace, workspace)
    (workspace / "link").symlink_to(tmp_path / "outside")
    config = workspace / "merge-gate.yml"
    config.write_text(f"{config.read_text()}\npublish: {target}\n")
    log = bytearray()
    limited = replace(run, workspace=workspace, config=config)
    assert step.run_here(limited, log.extend) == (0 if target == "inside" else 2), log.decode()
    assert list((tmp_path / "outside").iterdir()) == []
    assert (workspace / "inside" / "good").is_dir() == (target == "inside")


def test_a_directory_that_the_workflow_names_may_be_elsewhere(run: ContainerRun, tmp_path: Path) -> None:
    place = tmp_path / "models"
    elsewhere = replace(run, publish=place)
    log = bytearray()
    assert step.run_here(elsewhere, log.extend) == 0, log.decode()
    assert (place / "good").is_dir()


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in the place of the Python that runs the gate."""
    path = tmp_path / "python3"
    path.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    return path


def test_a_python_without_merge_gate(run: ContainerRun, python: Path, wording: Wording) -> None:
    """Without an engine, `auto` has no other runtime."""
    python.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    assert step.missing({})
    for refuse in (lambda: step.run_here(run, print), lambda: step.choose_runtime("auto", run.environ)):
        with wording.of(UsageError):
            refuse()


def test_an_older_python_is_a_sentence(run: ContainerRun, monkeypatch: pytest.MonkeyPatch, wording: Wording) -> None:
    older = SimpleNamespace(version_info=(3, 9, 2), version="3.9.2 (default)", executable="/usr/bin/python3")
    monkeypatch.setattr(step, "sys", older)
    with wording.of(UsageError):
        step.run_here(run, print)


@pytest.mark.parametrize("obeys", [True, False])
def test_a_signal_stops_the_gate_whether_it_obeys_or_not(run, python, obeys) -> None:
    trap = "trap 'echo stopped; exit 3' TERM" if obeys else "trap '' TERM"
    python.write_text(f'#!/bin/sh\n[ "$2" = "-c" ] && exit 0\n{trap}\necho $$\nwhile :; do sleep 0.05; done\n')
    said: list[bytes] = []

    def log(data: bytes) -> None:
        said.append(data)
        if len(said) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    assert step.run_here(run, log, stop_grace_s=20.0 if obeys else 0.2) == 3
    assert said[-1] == b"merge-gate: received SIGTERM; stopping the gate\n"
    assert not alive(int(said[0]))


def test_a_gate_that_dies_is_no_verdict(run: ContainerRun, python: Path, wording: Wording) -> None:
    """A Python that kills itself once the probe has been answered, as the kernel does when memory runs out."""
    python.write_text('#!/bin/sh\n[ "$2" = "-c" ] && exit 0\nkill -KILL $$\n', encoding="utf-8")
    with wording.of(LauncherError):
        step.run_here(run, print)
