"""The launcher against an engine at a socket file: a whole run, and each way in which it can go wrong.

The containers are functions of these tests; real ones, of Docker and podman, run in tests/e2e.
"""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from merge_gate._internal.errors import LauncherError
from merge_gate.action.docker import docker_api, leftovers, released_image
from merge_gate.action.docker.container import ContainerRun
from merge_gate.action.docker.launcher import run_in_container
from merge_gate.report.formats import json_report
from tests.support.action import engine_spec
from tests.support.action.stand_in import BREAK_OFF, Container, Engine, engine_at
from tests.support.reports import EMPTY
from tests.support.wording import Wording

# The SDK leaves the connection of a stream that broke off to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")

TOKEN = "hf_secret"
LAUNCHER, UNTIL = leftovers._LAUNCHER, leftovers._UNTIL


REPORT = json_report.render(EMPTY)


def judge(inside: Container) -> int:
    """What the gate does: a log, and a report in the output directory."""
    output = Path(inside.asked["Cmd"][inside.asked["Cmd"].index("--output") + 1])
    inside.say("judged 1 adapter\n")
    (inside.outside(output) / "report.json").write_text(REPORT)
    return 1


def wait_to_be_stopped(inside: Container) -> int:
    assert inside.told_to_stop.wait(30)
    inside.say("stopped\n")
    return 3


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with engine_at(tmp_path / "engine.sock", judge) as engine:
        yield engine
    gc.collect()


@pytest.fixture
def run(engine: Engine, tmp_path: Path) -> ContainerRun:
    workspace, temporary = tmp_path / "work", tmp_path / "temp"
    workspace.mkdir()
    temporary.mkdir()
    (workspace / "gate.yml").write_text("version: 1\n", encoding="utf-8")
    return ContainerRun(
        config=workspace / "gate.yml",
        output=tmp_path / "out",
        workspace=workspace,
        image="merge-gate:test",
        gpus="none",
        environ={"DOCKER_HOST": engine.address, "RUNNER_TEMP": str(temporary)},
    )


class Heard:
    """Everything that a run tells."""

    def __init__(self) -> None:
        self.log = b""
        self.images: list[str] = []
        self.warnings: list[str] = []
        self.refused: list[str] = []

    def write(self, data: bytes) -> None:
        self.log += data

    def run(self, run: ContainerRun) -> int:
        kinds = {"image": self.images, "warning": self.warnings, "refused": self.refused}
        return run_in_container(run, self.write, lambda kind, message: kinds[kind].append(message))


@pytest.fixture
def heard() -> Heard:
    return Heard()


def nothing_is_left(run: ContainerRun, engine: Engine) -> None:
    assert engine.containers == {}
    assert list(Path(run.environ["RUNNER_TEMP"]).iterdir()) == []


# --- a whole run -----------------------------------------------------------------------------------------------------


def test_a_run_gives_exit_code_log_and_report_and_leaves_nothing(run, engine: Engine, heard: Heard) -> None:
    assert heard.run(run) == 1
    assert heard.log == b"judged 1 adapter\n"
    assert (run.output / "report.json").read_text() == REPORT
    assert sorted(one.name for one in run.output.iterdir()) == ["report.json"], "no canary"
    assert (heard.images, heard.warnings, heard.refused) == (["sha256:1"], [], [])
    asked = engine.container.asked
    assert asked["Cmd"][:2] == ["run", "gate.yml"]
    assert asked["WorkingDir"] == str(run.workspace)
    host = asked["HostConfig"]
    assert asked["User"] == f"{os.getuid()}:{os.getgid()}"
    assert {*map(int, host.get("GroupAdd") or ()), os.getgid()} == {*os.getgroups(), os.getgid()}
    assert (host["CapDrop"], host["SecurityOpt"], host["ReadonlyRootfs"]) == (["ALL"], ["no-new-privileges"], True)
    assert engine_spec.devices(asked) == []
    assert not [request for request in engine.asked if request.endswith("/attach")], "there is nothing to hand over"
    nothing_is_left(run, engine)


def test_a_person_hears_everything_in_the_log(run, engine: Engine, wording: Wording) -> None:
    engine.wrong["GET /containers/json"] = [(500, {"message": "database is locked"})] * 4
    said: list[bytes] = []
    assert run_in_container(run, said.append) == 1
    first, _, _ = b"".join(said).partition(b"\n")
    assert first.startswith(b"merge-gate: ")
    wording(first.decode())


def test_a_token_goes_by_standard_input_and_stands_nowhere_else(run, engine: Engine, heard: Heard) -> None:
    def tell(inside: Container) -> int:
        inside.say(str(json.loads(inside.read_line())))
        return 0

    engine.run = tell
    assert heard.run(replace(run, environ={**run.environ, "HF_TOKEN": TOKEN})) == 0
    assert heard.log.decode() == str({"HF_TOKEN": TOKEN})
    assert TOKEN not in json.dumps(engine.container.asked)
    assert engine.container.asked["OpenStdin"] is True


def test_caches_and_mounts_are_made_and_stay(run, engine: Engine, heard: Heard, tmp_path: Path) -> None:
    (tmp_path / "bases").mkdir()
    run = replace(
        run, hf_cache=tmp_path / "hf", cache=tmp_path / "verdicts", publish=tmp_path / "merged",
        mounts=(tmp_path / "bases",),
        memory="16g", shm_size="1g", cpus="2",
    )  # fmt: skip
    assert heard.run(run) == 1
    mounted = {one["Target"]: one["ReadOnly"] for one in engine.container.asked["HostConfig"]["Mounts"]}
    assert mounted == {
        str(run.workspace): True, str(tmp_path / "bases"): True,
        str(run.output): False, str(tmp_path / "hf"): False, str(tmp_path / "verdicts"): False,
        str(tmp_path / "merged"): False,
    }  # fmt: skip
    assert [list((tmp_path / name).iterdir()) for name in ("hf", "verdicts", "merged")] == [[]] * 3, "no canary stays"
    host = engine.container.asked["HostConfig"]
    assert (host["Memory"], host["ShmSize"], host["NanoCpus"]) == (16 << 30, 1 << 30, 2_000_000_000)
    nothing_is_left(run, engine)


@pytest.mark.parametrize("offline", ["1", "on", "TRUE"])
def test_a_run_without_the_hub_has_no_network(run, engine: Engine, heard: Heard, offline: str) -> None:
    heard.run(replace(run, environ={**run.environ, "HF_HUB_OFFLINE": offline}))
    assert engine.container.asked["HostConfig"]["NetworkMode"] == "none"


def test_an_engine_is_served_as_it_says_that_it_is(run, engine: Engine, heard: Heard) -> None:
    engine.info |= RUNTIME | {"SecurityOptions": ["name=selinux", "name=userns", "name=rootless"]}
    heard.run(run)
    host = engine.container.asked["HostConfig"]
    assert host["SecurityOpt"] == ["no-new-privileges", "label=disable"]
    assert (host["UsernsMode"], engine.container.asked["User"]) == ("host", "0:0")
    assert engine.container.environ["NVIDIA_VISIBLE_DEVICES"] == "void", "the image asks for all GPUs"
    assert "MERGE_GATE_GPUS" not in engine.container.environ


# --- images ----------------------------------------------------------------------------------------------------------


def test_an_image_that_is_not_there_is_pulled(run, engine: Engine, heard: Heard, monkeypatch) -> None:
    monkeypatch.setattr(docker_api, "PROGRESS_S", 0.0)
    engine.can_pull["host/gate:1"] = {"Id": "sha256:2", "RepoDigests": ["host/gate@sha256:3"]}
    layers = ("a", 1_000_000, 4_000_000), ("b", 2_000_000, 6_000_000)
    engine.pull_says = [{"status": "Pulling from host/gate"}] + [
        {"status": "Downloading", "id": layer, "progressDetail": {"current": current, "total": total}}
        for layer, current, total in layers
    ]
    assert heard.run(replace(run, image="host/gate:1")) == 1
    pulled = b"pulling host/gate:1\npulling: 1 of 4 MB\npulling: 3 of 10 MB\n"
    assert heard.log == pulled + b"judged 1 adapter\n"
    assert heard.images == ["host/gate@sha256:3"]


def test_a_pull_may_be_asked_for_and_forbidden(run, engine: Engine, heard: Heard, wording: Wording) -> None:
    engine.can_pull["merge-gate:test"] = {"Id": "sha256:newer"}
    assert heard.run(replace(run, pull="never")) == 1
    assert heard.run(replace(run, pull="always")) == 1
    assert heard.images == ["sha256:1", "sha256:newer"]
    with wording.of(LauncherError):
        heard.run(replace(run, image="absent", pull="never"))
    nothing_is_left(run, engine)


@pytest.mark.parametrize(
    "says", [[{"status": "Pulling"}, {"error": "manifest unknown"}], [{"status": "Pulling"}]], ids=["error", "no image"]
)
def test_a_pull_that_brings_nothing(run, engine: Engine, heard: Heard, says: list, wording: Wording) -> None:
    engine.pull_says = says
    with wording.of(LauncherError):
        heard.run(replace(run, image="host/gate:1"))
    assert engine.made == []


@pytest.mark.parametrize(("gpus", "image"), [("none", "CPU"), ("all", "CUDA")])
def test_a_release_runs_its_own_image(run, engine: Engine, heard: Heard, monkeypatch, gpus: str, image: str) -> None:
    monkeypatch.setattr(released_image, image, "gate:1")
    engine.images = {"gate:1": {"Id": "gate:1"}}
    heard.run(replace(run, image="", gpus=gpus))
    assert heard.images == [engine.container.asked["Image"]] == ["gate:1"]


# --- GPUs ------------------------------------------------------------------------------------------------------------

RUNTIME = {"Runtimes": {"runc": {}, "nvidia": {}}}
CDI = {"DiscoveredDevices": [{"Source": "cdi", "ID": "nvidia.com/gpu=0"}]}
ENGINES = [
    ("Docker", {}, "docker"),  # refuses with a reason if it has no toolkit
    ("Docker", RUNTIME, "docker"),
    ("Docker", RUNTIME | CDI, "docker"),
    ("Docker", CDI, "cdi"),
    ("podman", {}, "cdi"),  # lists no devices over its API, and ignores any other form
    ("podman", RUNTIME | CDI, "cdi"),
]
UUID = "GPU-fef8089b-4820-abfc-e83e-94318197576e"
BY_COUNT = {"Count": -1, "Capabilities": [["gpu"]]}


def by_name(*names: str) -> dict:
    return {"DeviceIDs": list(names), "Capabilities": [["gpu"]]}


def by_cdi(*names: str) -> dict:
    return {"Driver": "cdi", "DeviceIDs": [f"nvidia.com/gpu={name}" for name in names]}


@pytest.mark.parametrize(
    ("gpus", "docker", "cdi", "visible"),
    [
        ("all", BY_COUNT, by_cdi("all"), "all"),
        ("0", by_name("0"), by_cdi("0"), "0"),
        ("0,1", by_name("0", "1"), by_cdi("0", "1"), "0,1"),
        (UUID, by_name(UUID), by_cdi(UUID), UUID),
        ("0:1", by_name("0:1"), by_cdi("0:1"), "0:1"),
        ("nvidia.com/gpu=all", by_cdi("all"), by_cdi("all"), "void"),
        ("nvidia.com/gpu=0,nvidia.com/gpu=1", by_cdi("0", "1"), by_cdi("0", "1"), "void"),
    ],
)
@pytest.mark.parametrize(("name", "info", "form"), ENGINES)
def test_each_engine_gets_a_request_of_its_own_specification(
    run, engine: Engine, heard: Heard, name: str, info: dict, form: str, gpus: str, docker, cdi, visible: str
) -> None:
    engine.info |= info
    engine.version["Components"] = [{"Name": f"{name} Engine"}]
    assert heard.run(replace(run, gpus=gpus)) == 1
    container = engine.container
    assert engine_spec.devices(container.asked) == [docker if form == "docker" else cdi]
    assert container.environ["NVIDIA_VISIBLE_DEVICES"] == (visible if form == "docker" else "void")
    assert container.environ["MERGE_GATE_GPUS"] == gpus
    host = container.asked["HostConfig"]
    assert (host["CapDrop"], host["SecurityOpt"], host["ReadonlyRootfs"]) == (["ALL"], ["no-new-privileges"], True)
    assert (host.get("Devices"), host.get("Privileged"), host.get("Runtime")) == (None, None, None)


@pytest.mark.parametrize(
    "request_",
    [
        {"Driver": "", "Count": -1, "DeviceIDs": ["0"], "Capabilities": [["gpu"]]},
        {"Driver": "", "Count": -1},
        {"Driver": "", "DeviceIDs": "0,1", "Capabilities": [["gpu"]]},
        {"Driver": "", "Count": "all", "Capabilities": [["gpu"]]},
        {"Driver": "cdi", "DeviceIDs": ["0"]},
        {"Driver": "cdi", "Count": -1},
        {"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=0"], "Device": 0},
    ],
)
def test_a_request_that_docker_does_not_take_is_seen(request_: dict) -> None:
    assert engine_spec.problems({"HostConfig": {"DeviceRequests": [request_]}})


# --- what an engine refuses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    ["GET /info", "GET /images/.*", "POST /containers/create", "POST /containers/.*/start", "POST /containers/.*/wait"],
)
def test_an_engine_that_fails_is_a_sentence_and_nothing_is_left(run, engine, heard, request_, wording) -> None:
    engine.wrong[request_] = [(500, {"message": "broken"})]
    with wording.of(LauncherError):
        heard.run(run)
    nothing_is_left(run, engine)


@pytest.mark.parametrize("request_", ["attach", "wait"])
def test_an_engine_that_goes_away_is_a_sentence(run, engine, heard, request_, wording) -> None:
    engine.wrong[f"POST /containers/.*/{request_}"] = [BREAK_OFF]
    with pytest.raises(LauncherError) as raised:
        heard.run(replace(run, environ={**run.environ, "HF_TOKEN": TOKEN}))
    wording(raised.value.message.partition(": ")[0])
    nothing_is_left(run, engine)


def test_a_log_that_breaks_off_costs_the_log_alone(run, engine: Engine, heard: Heard) -> None:
    engine.wrong["GET /containers/.*/logs"] = [BREAK_OFF]
    assert heard.run(run) == 1
    assert heard.log == b""
    assert (run.output / "report.json").exists()


def test_a_container_that_was_killed_is_no_verdict(run, engine: Engine, heard: Heard, wording: Wording) -> None:
    engine.run = lambda _inside: 137
    with wording.of(LauncherError):
        heard.run(run)
    nothing_is_left(run, engine)


def test_an_engine_of_a_context_that_does_not_answer(run, engine: Engine, heard: Heard, wording: Wording) -> None:
    engine.wrong["GET /version"] = [(500, {"message": "starting"})]
    with wording.of(LauncherError):
        heard.run(run)


# --- what is left of others, and of this run -------------------------------------------------------------------------


def orphan(engine: Engine, **labels: str) -> Container:
    made = Container("f" * 12, "merge-gate-orphan", {"Labels": {**leftovers.LABEL, **labels}})
    engine.containers[made.id] = made
    return made


def test_a_container_whose_launcher_is_gone_is_removed_alone(run, engine: Engine, heard: Heard) -> None:
    orphan(engine, **{UNTIL: "1"})
    assert heard.run(run) == 1
    assert engine.containers == {}
    living = orphan(engine)
    assert heard.run(run) == 1
    assert list(engine.containers.values()) == [living]


def test_an_orphan_that_cannot_be_removed_is_told(run, engine: Engine, heard: Heard, wording: Wording) -> None:
    orphan(engine, **{UNTIL: "1"})
    engine.wrong["DELETE /containers/f+"] = [(409, {"message": "removal is in progress"})] * 6
    assert heard.run(run) == 1
    (said,) = heard.warnings
    wording(said)


def test_a_list_that_fails_once_is_asked_for_again(run, engine: Engine, heard: Heard) -> None:
    engine.wrong["GET /containers/json"] = [(500, {"message": "no such container"})]
    assert heard.run(run) == 1
    assert heard.warnings == []


def test_a_directory_that_cannot_be_made_is_a_sentence(run, engine, heard, tmp_path, wording) -> None:
    (tmp_path / "file").touch()
    with wording.of(LauncherError):
        heard.run(replace(run, hf_cache=tmp_path / "file" / "hf"))
    assert engine.made == []
    nothing_is_left(run, engine)


def test_code_that_removes_its_report_directory_costs_the_report(run, engine, heard, wording) -> None:
    def remove(inside: Container) -> int:
        shutil.rmtree(inside.outside(run.output))
        return 0

    engine.run = remove
    assert heard.run(run) == 0
    (said,) = heard.refused
    wording(re.sub("[0-9a-f]{16}", "<random>", said))
    assert list(run.output.iterdir()) == []
    nothing_is_left(run, engine)


# --- signals ---------------------------------------------------------------------------------------------------------


def test_a_signal_stops_the_gate_inside_and_keeps_its_report(run, engine: Engine, heard: Heard) -> None:
    def judge_for_long(inside: Container) -> int:
        judge(inside)
        os.kill(os.getpid(), signal.SIGTERM)
        return wait_to_be_stopped(inside)

    engine.run = judge_for_long
    assert heard.run(run) == 3
    assert b"merge-gate: received SIGTERM; stopping the container\n" in heard.log
    assert b"stopped\n" in heard.log, "its last words too"
    assert (run.output / "report.json").exists()
    nothing_is_left(run, engine)


def test_the_time_limit_stops_it_too(run, engine: Engine, heard: Heard) -> None:
    engine.run = wait_to_be_stopped
    assert heard.run(replace(run, timeout_s=1.0)) == 3
    assert b"the time limit of " in heard.log
    nothing_is_left(run, engine)


def send_a_signal() -> None:
    """To the main thread, and not before it has been taken."""
    taken = threading.Event()
    os.kill(os.getpid(), signal.SIGINT)
    taken.wait(0.05)


@pytest.mark.parametrize("request_", ["GET /info", "POST /containers/create"])
def test_a_signal_before_the_start_starts_nothing(run, engine: Engine, heard: Heard, request_: str) -> None:
    engine.before[request_] = send_a_signal
    assert heard.run(run) == 3
    assert heard.log == b"merge-gate: received SIGINT\n"
    assert not [request for request in engine.asked if request.endswith("/start")]
    nothing_is_left(run, engine)


# --- which containers nobody waits for any longer --------------------------------------------------------------------


def test_a_container_of_a_launcher_that_lives_stays() -> None:
    ours = leftovers.labels(60)
    assert ours.items() >= leftovers.LABEL.items()
    assert not leftovers.is_orphan(ours, time.time())
    assert not leftovers.is_orphan(ours, time.time() + 1e6), "as long as its launcher lives"


def test_a_container_of_a_launcher_that_died_goes() -> None:
    code = "import json; from merge_gate.action.docker import leftovers; print(json.dumps(leftovers.labels(60)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert leftovers.is_orphan(eval(done.stdout), time.time())


def test_a_process_id_that_was_given_again_is_another_process() -> None:
    boot, space, process, start = leftovers.labels(60)[LAUNCHER].split("/")
    assert leftovers.is_orphan({LAUNCHER: f"{boot}/{space}/{process}/{int(start) - 1}"}, 0)


@pytest.mark.parametrize("launcher", ["other-boot/1/2/3", "", "nonsense", "{boot}/{space}", "{boot}/{space}/../../1"])
def test_one_of_another_machine_goes_when_its_time_is_over(launcher: str) -> None:
    boot, space, *_ = leftovers.labels(60)[LAUNCHER].split("/")
    ours = {LAUNCHER: launcher.format(boot=boot, space=space), UNTIL: "1000"}
    assert not leftovers.is_orphan(ours, 999)
    assert leftovers.is_orphan(ours, 1001)


@pytest.mark.parametrize("ours", [{}, {UNTIL: "soon"}, {UNTIL: ""}])
def test_one_that_says_nothing_stays(ours: dict[str, str]) -> None:
    assert not leftovers.is_orphan(ours, time.time())
