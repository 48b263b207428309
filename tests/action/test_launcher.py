"""What the container is told and given. Real containers run in tests/e2e."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from merge_gate import cli
from merge_gate.action import launcher, released_image
from merge_gate.action.launcher import ContainerRun, run_in_container
from merge_gate.errors import LauncherError, UsageError

TOKEN = "hf_secret"


@pytest.fixture
def run(tmp_path: Path) -> ContainerRun:
    workspace = tmp_path / "work"
    (workspace / "gate").mkdir(parents=True)
    (workspace / "gate" / "config.yml").write_text("version: 1\n", encoding="utf-8")
    return ContainerRun(
        config=workspace / "gate" / "config.yml",
        output=tmp_path / "out",
        workspace=workspace,
        image="merge-gate:test",
        environ={"DOCKER_HOST": "unix:///nowhere/docker.sock", "HF_TOKEN": TOKEN, "AWS_SECRET_ACCESS_KEY": "x"},
    )


def test_the_words_hold_no_secret_and_are_relative_to_the_workspace(run: ContainerRun) -> None:
    words = launcher.command(replace(run, arguments=("--only", "a b")), "")
    assert words == ["run", "gate/config.yml", "--output", str(run.output), "--device", "auto", "--only", "a b"]
    assert TOKEN not in repr(run)


@pytest.mark.parametrize(
    ("gpus", "device", "told"),
    [("", "auto", "auto"), ("all", "auto", "cuda"), ("0", "cuda:0", "cuda:0"), ("", "cpu", "cpu")],
)
def test_where_gpus_are_asked_for_a_cpu_is_no_answer(run: ContainerRun, gpus: str, device: str, told: str) -> None:
    words = launcher.command(replace(run, device=device), gpus)
    assert words[words.index("--device") + 1] == told


def test_only_what_the_gate_needs_is_passed_on(run: ContainerRun, tmp_path: Path) -> None:
    environ = launcher.environment(run, tmp_path / "cache", [], "")
    assert environ["HF_TOKEN"] == TOKEN
    assert environ["HF_HOME"] == str(tmp_path / "cache")
    assert environ["NVIDIA_VISIBLE_DEVICES"] == "void", "the image says `all`, for hosts that read it"
    assert str(run.config) in environ["MERGE_GATE_CANARIES"]
    assert set(environ) == {"HF_TOKEN", "HF_HOME", "NVIDIA_VISIBLE_DEVICES", "MERGE_GATE_CANARIES"}
    assert launcher.environment(run, tmp_path, [], "0,1")["MERGE_GATE_GPUS"] == "0,1"


def test_a_config_that_is_not_there(run: ContainerRun) -> None:
    with pytest.raises(UsageError, match="is not a file"):
        run_in_container(replace(run, config=run.workspace / "other.yml"), print)


def test_a_config_that_the_container_would_not_see(run: ContainerRun, tmp_path: Path) -> None:
    config = tmp_path / "config.yml"
    config.touch()
    with pytest.raises(UsageError, match="outside the workspace"):
        run_in_container(replace(run, config=config), print)


@pytest.mark.parametrize("path", ["/", "/usr/share/x", "/etc", "/opt/merge-gate"])
def test_what_would_hide_the_image(run: ContainerRun, path: str) -> None:
    with pytest.raises(UsageError, match="hide the container's own files"):
        run_in_container(replace(run, output=Path(path)), print)


def test_a_commit_that_is_no_release_pins_no_image(run: ContainerRun) -> None:
    assert (released_image.CPU, released_image.CUDA) == ("", "")
    with pytest.raises(UsageError, match="pins none") as raised:
        run_in_container(replace(run, image=""), print)
    assert "image:" in raised.value.hint


def test_no_engine_and_nothing_is_made(run: ContainerRun) -> None:
    with pytest.raises(LauncherError, match="does not answer"):
        run_in_container(run, print)
    assert not run.output.exists()


def test_a_person_needs_to_say_nothing(run: ContainerRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.workspace)
    environ = {"HF_HOME": str(tmp_path / "cache"), "DOCKER_HOST": "unix:///nowhere/docker.sock"}
    asked = launcher.for_a_person(
        "gate/config.yml", output="out", arguments=("--only", "a", "--only", "b c"), environ=environ
    )
    assert (asked.config, asked.workspace) == (run.config, run.workspace)
    assert asked.output == run.workspace / "out"
    assert asked.hf_cache == tmp_path / "cache"
    assert asked.arguments == ("--only", "a", "--only", "b c")


def test_the_command_hands_on_what_the_gate_inside_has_to_know(
    run: ContainerRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "gate.yml"
    config.write_text("version: 1\nadapters: [./a]\n", encoding="utf-8")
    asked: list[ContainerRun] = []
    monkeypatch.setattr(launcher, "run_in_container", lambda wanted, _log: asked.append(wanted) or 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    cli.main(["run", str(config), "--container", "--only", "a", "--exhaustive", "--image", "x:y"])
    assert asked[0].arguments == ("--only", "a", "--exhaustive")


def test_a_config_elsewhere_brings_its_own_workspace(run: ContainerRun, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    asked = launcher.for_a_person(str(run.config), output="out", environ={"XDG_CACHE_HOME": str(tmp_path)})
    assert asked.workspace == run.config.parent
    assert asked.output == tmp_path / "home" / "out"
    assert asked.hf_cache == tmp_path / "huggingface"


def test_an_output_that_leads_elsewhere(run: ContainerRun, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="symbolic link"):
        run_in_container(replace(run, output=tmp_path / "link" / "out"), print)
