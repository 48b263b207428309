"""The gate in the real image, through the Docker SDK against podman's API: the launcher as the action calls it."""

import contextlib
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import docker
import jsonschema
import pytest

from merge_gate._internal.errors import LauncherError
from merge_gate.action.docker import docker_api
from merge_gate.action.docker.container import ContainerRun
from merge_gate.action.docker.launcher import run_in_container
from merge_gate.report.stored.report_files import FORMATS
from tests.support.e2e.docker_engine import cdi_specification
from tests.support.e2e.engines import PATIENCE_S, as_user, described, serving
from tests.support.e2e.launch import LAUNCH, TOKEN
from tests.support.schemas import report_schema

pytestmark = pytest.mark.e2e


class Log:
    def __init__(self) -> None:
        self.data = b""
        self.seen = threading.Event()

    def __call__(self, data: bytes) -> None:
        self.data += data

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", "replace")


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def run(engine: str, image: str, demo: Path, tmp_path: Path) -> ContainerRun:
    """The demo's good adapter, in the image, without the network."""
    return ContainerRun(
        config=demo / "green.yml",
        output=tmp_path / "report",
        workspace=demo,
        image=image,
        environ={"DOCKER_HOST": engine, "HF_HUB_OFFLINE": "1", "RUNNER_TEMP": str(tmp_path)},
    )


def digest(directory: Path) -> str:
    """Names, modes, owners and bytes of everything below a directory."""
    seen = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        seen.update(f"{path} {status.st_mode} {status.st_uid} {status.st_mtime_ns}".encode())
        seen.update(path.read_bytes() if path.is_file() else b"")
    return seen.hexdigest()


def report_of(run: ContainerRun) -> dict:
    report = json.loads((run.output / "report.json").read_text())
    jsonschema.validate(report, report_schema())
    return report


# --- the gate inside ------------------------------------------------------------------------------------------------


def test_a_good_adapter_passes_and_nothing_is_left(run: ContainerRun, log: Log, engine: str, tmp_path: Path) -> None:
    before = digest(run.workspace)
    assert run_in_container(run, log) == 0, log.text
    report = report_of(run)
    assert (report["result"], report["complete"]) == ("pass", True)
    assert report["config"]["path"] == "green.yml"
    assert report["environment"]["torch"].startswith("2.")
    assert "good (float16): passed" in log.text
    assert digest(run.workspace) == before
    assert sorted(path.name for path in run.output.iterdir()) == sorted(FORMATS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report"], "cache and canaries are gone"
    assert described(engine, run.output) == []


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("version: 1\nadapters: []\n", 2),
        ("version: 1\nbase: {model: nobody/nothing}\nadapters: [./adapters/good]\n", 3),
    ],
)
def test_what_cannot_be_judged_has_its_own_exit_codes(run: ContainerRun, log: Log, text: str, code: int) -> None:
    config = run.workspace / f"exit-{code}.yml"
    config.write_text(text, encoding="utf-8")
    try:
        assert run_in_container(replace(run, config=config), log) == code, log.text
    finally:
        config.unlink()
    assert "Traceback" not in log.text


def test_a_person_gets_the_same_by_one_option(run: ContainerRun, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "merge_gate", "run", "--container", "--image", run.image, "merge-gate.yml",
         "--output", str(run.output), "--only", "nan", "--only", "good"],
        cwd=run.workspace,
        env={**run.environ, "PATH": os.environ["PATH"], "HF_HOME": str(tmp_path / "cache")},
        check=False,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "good (float16): passed" in done.stdout
    assert [adapter["name"] for adapter in report_of(run)["adapters"]] == ["good", "nan"]


# --- the caller -----------------------------------------------------------------------------------------------------


def test_an_ordinary_user_owns_what_the_gate_writes(run: ContainerRun, demo: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="user-") as directory:
        home = Path(directory)
        shutil.copytree(demo, home / "gate")
        home.chmod(0o755)
        (home / "mine").mkdir()
        os.chown(home / "mine", 1001, 1001)
        run = replace(
            run,
            config=home / "gate" / "merge-gate.yml",
            workspace=home / "gate",
            output=home / "mine" / "report",
            hf_cache=home / "mine" / "cache",
            environ={**run.environ, "RUNNER_TEMP": str(home / "mine")},
        )
        before = digest(home / "gate")
        with (home / "log").open("wb", buffering=0) as log:
            code = as_user(1001, lambda: run_in_container(run, log.write))
        assert code == 1, (home / "log").read_text()
        assert report_of(run)["counts"]["failed"] == 5
        assert {path.stat().st_uid for path in (home / "mine").rglob("*")} == {1001}
        assert digest(home / "gate") == before


# --- stopping -------------------------------------------------------------------------------------------------------


class Running:
    """A launcher in a process of its own, with a gate that has a minute's work."""

    def __init__(self, run: ContainerRun, directory: Path, timeout_s: float) -> None:
        entries = "".join(f"  - {{name: a{index}, path: ./adapters/good}}\n" for index in range(4000))
        (run.workspace / "slow.yml").write_text(
            f"version: 1\nbase: {{model: ./base}}\nadapters:\n{entries}", encoding="utf-8"
        )
        self.log = directory / "log"
        self.run = run
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, run.workspace / "slow.yml", run.output, run.image],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**run.environ, "PATH": os.environ["PATH"], "HF_TOKEN": TOKEN, "LIMIT": str(timeout_s)},
            )

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, text: str, timeout_s: float = PATIENCE_S) -> None:
        end = time.monotonic() + timeout_s
        while text not in self.text:
            assert time.monotonic() < end, self.text
            assert self.process.poll() is None, self.text
            time.sleep(0.1)


@pytest.fixture
def start(run: ContainerRun, tmp_path: Path) -> Iterator:
    started = []

    def start(timeout_s: float = 600, **changes) -> Running:
        started.append(Running(replace(run, **changes), tmp_path, timeout_s))
        return started[-1]

    yield start
    for running in started:
        running.process.kill()
        running.process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_container_and_leaves_a_true_report(start, engine: str, number: signal.Signals) -> None:
    running = start()
    running.wait_for("[3/4000]")
    before = time.monotonic()
    running.process.send_signal(number)
    assert running.process.wait(PATIENCE_S) == 3, running.text
    assert time.monotonic() - before < 7.5, "the runner sends SIGTERM then, and kills soon after"
    report = report_of(running.run)
    assert report["complete"] is False
    assert report["result"] == "error"
    assert 2 <= report["counts"]["passed"] < 4000
    assert f"received {number.name}" in running.text
    assert described(engine, running.run.output) == []
    assert [path.name for path in running.run.output.iterdir() if path.name.startswith("canary")] == []


def test_the_time_limit_does_the_same(start, engine: str) -> None:
    running = start(timeout_s=4.2)
    assert running.process.wait(PATIENCE_S) == 3, running.text
    assert "0.07 min" in running.text
    assert described(engine, running.run.output) == []


def test_a_container_that_is_killed_is_no_verdict(start, engine: str, podman) -> None:
    running = start()
    running.wait_for("[2/4000]")
    (container,) = described(engine, running.run.output)
    podman("kill", container["Id"])
    assert running.process.wait(PATIENCE_S) == 3, running.text
    assert "exit code 137" in running.text
    assert report_of(running.run)["complete"] is False


def test_a_token_is_in_the_gates_memory_and_nowhere_else(start, engine: str, podman) -> None:
    running = start()
    running.wait_for("[2/4000]")
    (container,) = described(engine, running.run.output)
    assert TOKEN not in json.dumps(container)
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            assert TOKEN.encode() not in (process / "cmdline").read_bytes(), process
    running.process.send_signal(signal.SIGTERM)
    running.process.wait(PATIENCE_S)
    assert TOKEN not in running.text
    assert not [path for path in running.run.output.rglob("*") if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in podman("image", "inspect", running.run.image) + podman(
        "history", "--no-trunc", running.run.image
    )


# --- GPUs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_gpu() -> Iterator[None]:
    """A CDI device as NVIDIA's toolkit would describe it, that is /dev/null."""
    folders = [Path("/etc/cdi"), Path("/var/run/cdi")]
    if any("nvidia.com/gpu" in path.read_text() for folder in folders for path in folder.glob("*")):
        pytest.skip("this machine has real GPUs, described for CDI")
    spec = folders[1] / "merge-gate-e2e.json"
    spec.parent.mkdir(exist_ok=True)
    spec.write_text(cdi_specification(), encoding="utf-8")
    yield
    spec.unlink()


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize("gpus", ["all", "0"])
def test_a_gpu_that_is_asked_for_arrives_and_no_cpu_instead(run: ContainerRun, log: Log, gpus: str) -> None:
    """The device is there; torch in the CPU image cannot use it; that is an error and not a run on the CPU."""
    assert run_in_container(replace(run, gpus=gpus), log) == 3, log.text
    assert "/dev/nvidia0" in log.text
    assert "device cuda" in log.text
    (judged,) = report_of(run)["adapters"]
    assert judged["verdict"] == "error"


@pytest.mark.usefixtures("fake_gpu")
def test_a_request_that_the_engine_ignores_is_an_error(run: ContainerRun, log: Log, monkeypatch) -> None:
    """Taken for Docker, podman gets Docker's words: it starts the container without a GPU and says nothing."""
    facts = docker_api.Engine(
        podman=False, rootless=False, remapped=False, selinux=False, nvidia_runtime=True, cdi_gpus=False
    )
    monkeypatch.setattr(docker_api, "describe", lambda _: facts)
    assert run_in_container(replace(run, gpus="all"), log) == 3
    assert "NVIDIA Container Toolkit" in log.text
    assert not (run.output / "report.json").exists()


# --- what is not there ----------------------------------------------------------------------------------------------


def test_an_engine_that_does_not_answer(run: ContainerRun, log: Log, tmp_path: Path) -> None:
    address = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(address))
    for environ in ({"DOCKER_HOST": f"unix://{address}"}, {"DOCKER_HOST": "tcp://127.0.0.1:1"}):
        with pytest.raises(LauncherError, match=re.escape(environ["DOCKER_HOST"])) as raised:
            run_in_container(replace(run, environ=environ), log)
        assert raised.value.hint


@pytest.mark.parametrize("name", ["localhost/no-such-image:latest", f"localhost/merge-gate@sha256:{'0' * 64}"])
def test_an_image_that_is_not_there(run: ContainerRun, log: Log, name: str) -> None:
    with pytest.raises(LauncherError, match=re.escape(name)) as raised:
        run_in_container(replace(run, image=name), log)
    assert "digest" in raised.value.hint


def test_mounts_that_are_empty(run: ContainerRun, log: Log, podman_environment: dict[str, str], tmp_path: Path) -> None:
    """An engine that sees other directories under the same names: on another host, or outside the job's container."""
    address = Path(tempfile.mkdtemp(prefix="elsewhere-")) / "podman.sock"
    script = 'for path in "$1" "$2"; do mkdir -p "$path"; mount -t tmpfs none "$path"; done; shift 2; exec "$@"'
    cache = tmp_path / "cache"
    run.output.mkdir()
    before = ("unshare", "--mount", "sh", "-c", script, "sh", str(run.workspace), str(cache))
    with serving(podman_environment, address, *before):
        run = replace(run, hf_cache=cache, environ={**run.environ, "DOCKER_HOST": f"unix://{address}"})
        assert run_in_container(run, log) == 3, log.text
    assert run.config.name in log.text
    assert "runtime: native" in log.text
    assert not (run.output / "report.json").exists()


# --- pulling --------------------------------------------------------------------------------------------------------


def test_an_image_is_pulled_by_its_digest(engine: str, podman, registry_port: int, tmp_path: Path, log: Log) -> None:
    """From a registry that serves one small image."""
    (tmp_path / "Containerfile").write_text("FROM scratch\nCOPY file /\n", encoding="utf-8")
    (tmp_path / "file").write_text("merge-gate", encoding="utf-8")
    podman("build", "--tag=localhost/small", tmp_path)
    podman("save", "--format=oci-dir", "--output", tmp_path / "oci", "localhost/small")
    podman("rmi", "localhost/small")
    manifest = json.loads((tmp_path / "oci" / "index.json").read_text())["manifests"][0]
    name = f"127.0.0.1:{registry_port}/acme/merge-gate@{manifest['digest']}"
    with (
        registry(registry_port, tmp_path / "oci", manifest),
        contextlib.closing(docker.DockerClient(base_url=engine)) as client,
    ):
        docker_api.ensure_image(client, name, log)
        assert client.images.get(name).attrs["RepoDigests"] == [name]
        assert "pulling" in log.text
        log.data = b""
        docker_api.ensure_image(client, name, log)
        assert log.text == "", "it is there now"
        client.images.remove(name)


@contextlib.contextmanager
def registry(port: int, layout: Path, manifest: dict) -> Iterator[None]:
    """The read-only half of a registry (OCI distribution specification) over an OCI image layout."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            digest = self.path.rpartition("sha256:")[2]
            blob = layout / "blobs" / "sha256" / digest
            found = blob.is_file()
            data = blob.read_bytes() if found else b"{}"
            self.send_response(200 if found or self.path == "/v2/" else 404)
            is_manifest = digest == manifest["digest"].rpartition(":")[2]
            self.send_header("Content-Type", manifest["mediaType"] if is_manifest else "application/octet-stream")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data if self.command == "GET" else b"")

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_words: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()
