"""What the container is told and given. Real containers run in tests/e2e."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from merge_gate._internal.errors import LauncherError, UsageError
from merge_gate.action.docker import container, launcher, released_image
from merge_gate.action.docker.container import ContainerRun
from merge_gate.action.docker.launcher import run_in_container
from merge_gate.cli import dispatch
from tests.support.wording import Wording


@pytest.fixture
def run(tmp_path: Path) -> ContainerRun:
    workspace = tmp_path / "workspace"
    (workspace / "gate").mkdir(parents=True)
    (workspace / "gate" / "config.yml").write_text("version: 1\n", encoding="utf-8")
    return ContainerRun(
        config=workspace / "gate" / "config.yml",
        output=tmp_path / "out",
        workspace=workspace,
        image="merge-gate:test",
        environ={"DOCKER_HOST": "unix:///nowhere/docker.sock", "RUNNER_TEMP": str(tmp_path)},
    )


def test_a_config_that_is_not_there(run: ContainerRun, wording: Wording) -> None:
    with pytest.raises(UsageError) as caught:
        run_in_container(replace(run, config=run.workspace / "other.yml"), print)
    wording(caught.value)


def test_a_config_that_the_container_would_not_see(run: ContainerRun, tmp_path: Path, wording: Wording) -> None:
    config = tmp_path / "config.yml"
    config.touch()
    with pytest.raises(UsageError) as caught:
        run_in_container(replace(run, config=config), print)
    wording(caught.value)


def test_a_config_that_is_a_link_out_of_the_workspace(run: ContainerRun, tmp_path: Path, wording: Wording) -> None:
    (tmp_path / "elsewhere.yml").touch()
    link = run.workspace / "link.yml"
    link.symlink_to(tmp_path / "elsewhere.yml")
    with pytest.raises(UsageError) as raised:
        run_in_container(replace(run, config=link), print)
    wording(raised.value)
    assert "mounts" in raised.value.hint
    with pytest.raises(LauncherError) as caught:  # which comes later
        run_in_container(replace(run, config=link, mounts=(tmp_path,)), print)
    wording(caught.value)


def test_adapters_that_the_container_would_not_see(run: ContainerRun, tmp_path: Path, wording: Wording) -> None:
    for name in ("workspace/a", "elsewhere"):
        (tmp_path / name).mkdir()
    (run.workspace / "link").symlink_to(tmp_path / "elsewhere")
    named = replace(run, config=None, adapters=("./a", "acme/lora"))
    for wrong in (
        replace(named, base=str(tmp_path / "elsewhere")),
        replace(named, adapters=("./link",)),
        replace(
            named, base=str(tmp_path / "elsewhere"), mounts=(tmp_path / "elsewhere",)
        ),  # fails for lack of an engine
    ):
        with pytest.raises((UsageError, LauncherError)) as caught:
            run_in_container(wrong, print)
        wording(caught.value)


def test_an_output_that_is_a_file(run: ContainerRun, tmp_path: Path, wording: Wording) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UsageError) as caught:
        run_in_container(run, print)
    wording(caught.value)


def test_a_mount_that_is_not_there_is_not_made(run: ContainerRun, tmp_path: Path, wording: Wording) -> None:
    """podman's API would make it, as root, and leave it."""
    with pytest.raises(UsageError) as caught:
        run_in_container(replace(run, mounts=(tmp_path / "bases",)), print)
    wording(caught.value)


@pytest.mark.parametrize("path", ["/", "/usr/share/x", "/etc", "/opt/merge-gate"])
def test_what_would_hide_the_image(run: ContainerRun, path: str, wording: Wording) -> None:
    with pytest.raises(UsageError) as caught:
        run_in_container(replace(run, output=Path(path)), print)
    wording(caught.value)


def test_a_commit_that_is_no_release_pins_no_image(run: ContainerRun, wording: Wording) -> None:
    assert (released_image.CPU, released_image.CUDA) == ("", "")
    with pytest.raises(UsageError) as raised:
        run_in_container(replace(run, image=""), print)
    wording(raised.value)
    assert "image:" in raised.value.hint


def test_no_engine_and_nothing_is_made(run: ContainerRun, wording: Wording) -> None:
    with pytest.raises(LauncherError) as caught:
        run_in_container(run, print)
    wording(caught.value)
    assert not run.output.exists()


def test_a_person_needs_to_say_nothing(run: ContainerRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.workspace)
    environ = {"HF_HOME": str(tmp_path / "cache"), "DOCKER_HOST": "unix:///nowhere/docker.sock"}
    asked = launcher.local_run(
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
    dispatch.main(["run", str(config), "--container", "--only", "a", "--refresh", "--image", "x:y"])
    assert asked[0].arguments == ("--only", "a", "--refresh")
    dispatch.main(["run", str(config), "--container", "--publish", "merged", "--max-shard-size", "1KiB"])
    assert asked[1].publish == tmp_path / "merged"
    more = ["--publish", str(tmp_path / "merged"), "--max-shard-size", "1.024KB"]
    assert container.gate_words(asked[1], "cpu")[-4:] == more


def test_a_config_elsewhere_brings_its_own_workspace(run: ContainerRun, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    asked = launcher.local_run(str(run.config), output="out", environ={"XDG_CACHE_HOME": str(tmp_path)})
    assert asked.workspace == run.config.parent
    assert asked.output == tmp_path / "home" / "out"
    assert asked.hf_cache == tmp_path / "huggingface"


def test_an_output_that_leads_elsewhere(run: ContainerRun, tmp_path: Path, wording: Wording) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UsageError) as caught:
        run_in_container(replace(run, output=tmp_path / "link" / "out"), print)
    with pytest.raises(UsageError, match="publish"):
        run_in_container(replace(run, publish=tmp_path / "link" / "out"), print)
    wording(caught.value)
