"""GPUs up to the driver: what Docker Engine asks of NVIDIA's toolkit, and the image with a simulated card.

The toolkit's hook and its CDI specification are stand-ins; the engines, the launcher and the image are real.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import docker
import pytest

from merge_gate._internal.errors import LauncherError
from merge_gate.action.docker.container import ContainerRun
from merge_gate.action.docker.launcher import run_in_container
from tests.support.card import build, compare
from tests.support.e2e.act import TAG, copy_action
from tests.support.e2e.docker_engine import UUIDS, Hook, cdi_specification, docker_engine
from tests.support.e2e.engines import BASE_IMAGE

pytestmark = pytest.mark.e2e

LIGHT_IMAGE = f"localhost/merge-gate-light:{TAG}"


@pytest.fixture
def run(demo: Path, tmp_path: Path) -> ContainerRun:
    """The demo's good adapter and its broken ones, offline."""
    environ = {"HF_HUB_OFFLINE": "1", "RUNNER_TEMP": str(tmp_path)}
    return ContainerRun(config=demo / "merge-gate.yml", output=tmp_path / "report", workspace=demo, environ=environ)


def on(address: str, run: ContainerRun) -> tuple[int, str]:
    """Return the exit code and the log of a run on the engine at `address`."""
    log = bytearray()
    code = run_in_container(replace(run, environ={**run.environ, "DOCKER_HOST": address}), log.extend)
    return code, log.decode()


def gpus_of(container: dict | None) -> set[str] | None:
    """All values of the variable that NVIDIA's hook and runtime read."""
    pairs = [variable.split("=", 1) for variable in container["process"]["env"]] if container else []
    return {value for name, value in pairs if name == "NVIDIA_VISIBLE_DEVICES"} if container else None


def check_limits(container: dict) -> None:
    """The action's limits, in the configuration that the runtime gets."""
    assert container["root"]["readonly"] is True
    assert container["process"]["noNewPrivileges"] is True
    assert not any(container["process"].get("capabilities", {}).values())
    (network,) = [space for space in container["linux"]["namespaces"] if space["type"] == "network"]
    assert "host" not in network.get("path", "")


# --- Docker Engine ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def light(podman, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The image's entrypoint and code without packages: enough for `--help`, which comes after the check of GPUs."""
    context = tmp_path_factory.mktemp("light")
    copy_action(context)
    (context / "Containerfile").write_text(
        f"FROM {BASE_IMAGE}\nCOPY entrypoint.py /gate/\nCOPY src/merge_gate /gate/merge_gate\n"
        "ENV NVIDIA_VISIBLE_DEVICES=all\n"
        'ENTRYPOINT ["python3", "/gate/entrypoint.py"]\n',
        encoding="utf-8",
    )
    podman("build", "--pull=never", f"--tag={LIGHT_IMAGE}", context)
    podman("save", "--quiet", "--output", context / "light.tar", LIGHT_IMAGE)
    podman("untag", LIGHT_IMAGE, LIGHT_IMAGE)
    return str(context / "light.tar")


@pytest.fixture(scope="module")
def hook(tmp_path_factory: pytest.TempPathFactory) -> Hook:
    hook = Hook(tmp_path_factory.mktemp("hook"))
    hook.write()
    return hook


@pytest.fixture(scope="module")
def with_toolkit(home: Path, hook: Hook, light: str) -> Iterator[str]:
    """Docker Engine with NVIDIA's toolkit and an image."""
    with docker_engine(home, hook) as address:
        with Path(light).open("rb") as file, contextlib.closing(docker.DockerClient(base_url=address)) as client:
            client.images.load(file)
        yield address


@pytest.mark.parametrize(
    ("gpus", "asked", "devices"),
    [
        ("all", {"all"}, [0, 1]),
        ("1", {"1"}, [1]),
        ("0,1", {"0,1"}, [0, 1]),
        (UUIDS[0], {UUIDS[0]}, [0]),
        ("nvidia.com/gpu=0", None, [0]),
        ("nvidia.com/gpu=all", None, [0, 1]),
        ("none", None, []),
    ],
)
def test_docker_gives_the_container_the_gpus_that_were_requested(
    with_toolkit: str, hook: Hook, run: ContainerRun, gpus: str, asked: set[str] | None, devices: list[int]
) -> None:
    """By the hook of NVIDIA's toolkit, or by CDI."""
    code, log = on(with_toolkit, replace(run, image=LIGHT_IMAGE, gpus=gpus, arguments=("--help",)))
    assert code == 0, log
    seen = [line.rpartition("/dev/nvidia")[2] for line in log.splitlines() if "merge-gate: sees" in line]
    assert seen == [str(number) for number in devices]
    container = hook.container()
    assert gpus_of(container) == asked
    if container:
        check_limits(container)


@pytest.mark.parametrize("gpus", ["7", "0,7", "nvidia.com/gpu=7"])
def test_a_gpu_that_does_not_exist_is_an_error(with_toolkit: str, run: ContainerRun, gpus: str) -> None:
    with pytest.raises(LauncherError, match=rf"GPUs \({gpus}\): .*7") as raised:
        on(with_toolkit, replace(run, image=LIGHT_IMAGE, gpus=gpus))
    assert "NVIDIA Container Toolkit" in raised.value.hint


def test_docker_without_the_toolkit_refuses_gpus(home: Path, run: ContainerRun) -> None:
    with docker_engine(home, None) as address:
        with contextlib.closing(docker.DockerClient(base_url=address)) as client:
            client.api.import_image_from_data(b"\0" * 1024, repository="empty")
        for gpus in ("all", "0", "nvidia.com/gpu=0"):
            with pytest.raises(LauncherError, match=rf"GPUs \({gpus}\): could not select device driver") as raised:
                on(address, replace(run, image="empty", gpus=gpus))
            assert "NVIDIA Container Toolkit" in raised.value.hint


# --- the image with a simulated card ---------------------------------------------------------------------------------

PACKAGES = "/opt/merge-gate/lib/python3.11/site-packages"


@pytest.fixture
def card(hook: Hook) -> Iterator[None]:
    """A simulated card that CDI adds to a container as it adds NVIDIA's driver: devices, files and variables."""
    library = build.library()
    files = {library: "card.so", **{path: path.name for path in build.HOOK.glob("*.py")}}
    settings = build.environment(Path(PACKAGES, "card.so"))[build.SETTINGS]
    specification = Path("/var/run/cdi/merge-gate-card.json")
    specification.parent.mkdir(exist_ok=True)
    specification.write_text(
        cdi_specification(
            env=[f"{build.SETTINGS}={settings}", f"LD_LIBRARY_PATH={PACKAGES}/torch/lib"],
            mounts=[
                {"hostPath": str(path), "containerPath": f"{PACKAGES}/{name}", "options": ["ro", "bind"]}
                for path, name in files.items()
            ],
            hooks=[{"hookName": "createRuntime", "path": str(hook.program), "args": ["hook"]}],
        ),
        encoding="utf-8",
    )
    yield
    specification.unlink()


@pytest.mark.usefixtures("card")
def test_on_a_simulated_card_the_report_is_that_of_the_cpu(
    engine: str, image: str, hook: Hook, run: ContainerRun, tmp_path: Path
) -> None:
    """In the image, under the limits of the action."""
    reports = {}
    for gpus in ("none", "0"):
        code, log = on(engine, replace(run, image=image, gpus=gpus, output=tmp_path / gpus))
        assert code == 1, log
        reports[gpus] = json.loads((tmp_path / gpus / "report.json").read_text(encoding="utf-8"))
    check_limits(hook.container())
    environment = {gpus: report["environment"] for gpus, report in reports.items()}
    assert environment["none"]["device"] == "cpu"
    assert environment["0"]["device"].startswith("cuda")
    assert environment["0"]["device_name"] == "Simulated card"
    assert compare.of_reports(reports["none"], reports["0"]) == []
