"""What the container is told and given. Real containers run in tests/e2e."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from merge_gate._internal.errors import LauncherError, UsageError
from merge_gate.action.docker import container, handover, launcher, released_image
from merge_gate.action.docker.container import ContainerRun, PreparedContainer
from merge_gate.action.docker.docker_api import Engine
from merge_gate.action.docker.launcher import run_in_container
from tests.support.wording import Wording

TOKEN = "hf_secret"
PLAIN = Engine(podman=False, rootless=False, remapped=False, selinux=False, nvidia_runtime=False, cdi_gpus=False)


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
        gpus="",
        environ={
            "HF_TOKEN": TOKEN,
            "HTTPS_PROXY": f"http://me:{TOKEN}@proxy",
            "AWS_SECRET_ACCESS_KEY": "x",
            "DOCKER_HOST": "unix:///nowhere/docker.sock",
        },
    )


@pytest.fixture
def prepared(tmp_path: Path) -> PreparedContainer:
    for name in ("cache", "written"):
        (tmp_path / name).mkdir()
    planted = handover.plant(tmp_path / "written")
    inside = tmp_path / "out" / planted.name
    return PreparedContainer(None, PLAIN, "merge-gate-1", tmp_path / "cache", tmp_path / "written", {inside: planted})


def test_the_words_have_no_secret_and_are_relative(run: ContainerRun) -> None:
    words = container.command(replace(run, arguments=("--only", "a b")))
    assert words == ["run", "gate/config.yml", "--output", str(run.output), "--device", "auto", "--only", "a b"]
    assert TOKEN not in repr(run)


def test_a_name_that_begins_with_a_dash_is_no_option(run: ContainerRun) -> None:
    assert container.command(replace(run, config=run.workspace / "-x.yml"))[1] == "./-x.yml"


@pytest.mark.parametrize(
    ("gpus", "device", "told"),
    [("", "auto", "auto"), ("all", "auto", "cuda"), ("0", "cuda:0", "cuda:0"), ("", "cpu", "cpu")],
)
def test_where_gpus_are_asked_for_a_cpu_is_no_answer(run: ContainerRun, gpus: str, device: str, told: str) -> None:
    words = container.command(replace(run, device=device, gpus=gpus))
    assert words[words.index("--device") + 1] == told


def test_whoever_inspects_the_container_sees_no_secret(run: ContainerRun, prepared: PreparedContainer) -> None:
    environ = container.environment(run, prepared)
    assert TOKEN not in str(environ)
    assert environ["HF_HOME"] == str(prepared.cache)
    assert environ["NVIDIA_VISIBLE_DEVICES"] == "void", "the image says `all`, for hosts that read it"
    assert str(run.config) in environ["MERGE_GATE_CANARIES"]
    assert str(run.output) in environ["MERGE_GATE_CANARIES"]
    assert str(prepared.written) not in environ["MERGE_GATE_CANARIES"], "that is its name outside"
    assert set(environ) == {"HF_HOME", "NVIDIA_VISIBLE_DEVICES", "MERGE_GATE_CANARIES", handover.MARKER}
    assert container.handed_over(run) == {"HF_TOKEN": TOKEN, "HTTPS_PROXY": f"http://me:{TOKEN}@proxy"}
    assert handover.MARKER not in container.environment(replace(run, environ={}), prepared)


def test_the_container_looks_for_the_first_adapter(run: ContainerRun, prepared: PreparedContainer) -> None:
    adapter = run.workspace / "a"
    adapter.mkdir()
    named = replace(run, config=None, adapters=("acme/lora", "./a"))
    assert str(adapter) not in container.environment(named, prepared)["MERGE_GATE_CANARIES"]
    (adapter / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert f"{adapter}/adapter_config.json" in container.environment(named, prepared)["MERGE_GATE_CANARIES"]
    assert container.config_word(named) == ""


@pytest.mark.parametrize("variable", ["MERGE_GATE_DEBUG", "RUNNER_DEBUG"])
def test_a_runner_that_debugs_debugs_the_gate_inside(run, prepared, variable) -> None:
    assert container.environment(replace(run, environ={variable: "1"}), prepared)["MERGE_GATE_DEBUG"] == "1"
    assert "MERGE_GATE_DEBUG" not in container.environment(replace(run, environ={variable: ""}), prepared)


def test_a_companys_own_authority_is_there_inside(run, prepared, tmp_path) -> None:
    (tmp_path / "company.pem").touch()
    (tmp_path / "link.pem").symlink_to(tmp_path / "company.pem")
    run = replace(
        run, environ={"SSL_CERT_FILE": str(tmp_path / "gone"), "REQUESTS_CA_BUNDLE": str(tmp_path / "link.pem")}
    )
    environ = container.environment(run, prepared)
    assert environ["SSL_CERT_FILE"] == environ["REQUESTS_CA_BUNDLE"] == container.AUTHORITIES_INSIDE
    last = container.mounts(run, prepared)[-1]
    assert (last["Source"], last["Target"]) == (str(tmp_path / "company.pem"), container.AUTHORITIES_INSIDE)
    assert last["ReadOnly"] is True


def test_the_secret_of_the_cache_is_seen_by_nobody(run: ContainerRun, prepared: PreparedContainer) -> None:
    key = "0123456789abcdef"
    run = replace(run, environ={"MERGE_GATE_CACHE_KEY": key, "MERGE_GATE_PLACE": "a/b run 7"})
    environ = container.environment(run, prepared)
    assert key not in str(environ)
    assert environ["MERGE_GATE_PLACE"] == "a/b run 7"
    assert container.handed_over(run) == {"MERGE_GATE_CACHE_KEY": key}


@pytest.mark.parametrize(
    ("code", "killed", "says"), [(137, False, "it was killed"), (1, True, ""), (125, False, "125")]
)
def test_other_exit_codes_are_no_verdict(code: int, killed: bool, says: str) -> None:
    if code == 1:
        assert container.exit_code(code, killed) == 1, "the gate lives when the kernel kills its worker"
        return
    with pytest.raises(LauncherError, match=says):
        container.exit_code(code, killed)


HIDING = ("/", "/usr/share/x", "/etc", "/opt/merge-gate")


REFUSED: dict[str, Callable[[ContainerRun, Path], ContainerRun]] = {
    "a config that is not there": lambda run, _: replace(run, config=run.workspace / "other.yml"),
    "a config elsewhere": lambda run, here: replace(run, config=here / "elsewhere.yml"),
    "a config behind a link": lambda run, _: replace(run, config=run.workspace / "link.yml"),
    "a base elsewhere": lambda run, here: replace(run, config=None, adapters=("acme/lora",), base=str(here / "bases")),
    "an adapter behind a link": lambda run, _: replace(run, config=None, adapters=("./a", "./link")),
    "an output that is a file": lambda run, here: replace(run, output=here / "elsewhere.yml"),
    "an output behind a link": lambda run, _: replace(run, output=run.workspace / "link" / "out"),
    "models behind a link": lambda run, _: replace(run, publish=run.workspace / "link" / "out"),
    "a mount that is not there": lambda run, here: replace(run, mounts=(here / "absent",)),
    "no image": lambda run, _: replace(run, image=""),
    **{f"{path} hidden": lambda run, _, path=path: replace(run, output=Path(path)) for path in HIDING},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_container_would_not_see_or_hide_is_refused(run, tmp_path, what, wording) -> None:
    """podman's API would make a mount that is not there, as root, and leave it."""
    assert (released_image.CPU, released_image.CUDA) == ("", ""), "a commit that is no release"
    (tmp_path / "elsewhere.yml").touch()
    for name in ("workspace/a", "bases"):
        (tmp_path / name).mkdir()
    (run.workspace / "link.yml").symlink_to(tmp_path / "elsewhere.yml")
    (run.workspace / "link").symlink_to(tmp_path / "bases")
    with wording.of(UsageError):
        run_in_container(REFUSED[what](replace(run, gpus="none"), tmp_path), print)


def test_what_mounts_make_visible_is_not_refused(run: ContainerRun, tmp_path: Path, wording: Wording) -> None:
    """The engine comes later, and nothing is made before."""
    (tmp_path / "elsewhere").mkdir()
    (run.workspace / "link").symlink_to(tmp_path / "elsewhere")
    run = replace(run, gpus="none")
    mounted = replace(run, mounts=(tmp_path / "elsewhere",))
    for given in (run, replace(mounted, config=None, adapters=("./link",), base=str(tmp_path / "elsewhere"))):
        with pytest.raises(LauncherError) as caught:
            run_in_container(given, print)
    wording(caught.value)
    assert not run.output.exists()


def test_a_person_needs_to_say_nothing(run: ContainerRun, tmp_path: Path, cwd) -> None:
    os.chdir(run.workspace)
    environ = {"HF_HOME": str(tmp_path / "cache"), "DOCKER_HOST": "unix:///nowhere/docker.sock"}
    asked = launcher.local_run(
        "gate/config.yml", output="out", arguments=("--only", "a", "--only", "b c"), environ=environ
    )
    assert (asked.config, asked.workspace) == (run.config, run.workspace)
    assert asked.output == run.workspace / "out"
    assert asked.hf_cache == tmp_path / "cache"
    assert asked.arguments == ("--only", "a", "--only", "b c")


def test_a_config_elsewhere_brings_its_own_workspace(run: ContainerRun, tmp_path: Path, cwd) -> None:
    (tmp_path / "home").mkdir()
    os.chdir(tmp_path / "home")
    asked = launcher.local_run(str(run.config), output="out", environ={"XDG_CACHE_HOME": str(tmp_path)})
    assert asked.workspace == run.config.parent
    assert asked.output == tmp_path / "home" / "out"
    assert asked.hf_cache == tmp_path / "huggingface"
