"""Ways to an engine: a socket file, TLS, a docker context, one that is rootless; and SDKs that are on the way."""

import contextlib
import hashlib
import json
import os
import pwd
import secrets
import shutil
import signal
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from merge_gate._internal.errors import LauncherError
from merge_gate.action.docker import handover
from merge_gate.action.docker.container import ContainerRun, handed_over
from merge_gate.action.docker.launcher import run_in_container
from tests.support.e2e.act import ROOT, free_port
from tests.support.e2e.engines import as_user, serving
from tests.support.e2e.proxy import proxy

pytestmark = pytest.mark.e2e


@pytest.fixture
def run(rogue_run: ContainerRun) -> ContainerRun:
    """A container that prints the digest of what it was handed."""
    rogue_run.config.write_text("digest", encoding="utf-8")
    return rogue_run


@pytest.fixture
def tls_engine(engine: str, certificates: Path) -> Iterator[str]:
    """The engine behind TLS, for those who show a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server-key.pem")
    context.load_verify_locations(certificates / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    port = free_port()
    with proxy(Path(engine.removeprefix("unix://")), port, tls=context):
        yield f"tcp://127.0.0.1:{port}"


def of_a_client(certificates: Path, folder: Path, *, with_certificate: bool = True) -> Path:
    """The files under the names that the docker command line reads."""
    folder.mkdir(parents=True)
    names = {
        "ca.pem": "ca.pem",
        **({"cert.pem": "client.pem", "key.pem": "client-key.pem"} if with_certificate else {}),
    }
    for name, source in names.items():
        (folder / name).write_bytes((certificates / source).read_bytes())
    return folder


def check_that_the_token_arrives(run: ContainerRun) -> None:
    log = bytearray()
    assert run_in_container(run, log.extend) == 3, log.decode()
    assert hashlib.sha256(handover.written(handed_over(run))).hexdigest() in log.decode()


@contextlib.contextmanager
def account(name: str) -> Iterator[pwd.struct_passwd]:
    """An ordinary user with a range of ids for containers, gone afterwards."""
    subprocess.run(["useradd", "--create-home", name], check=True, capture_output=True)
    try:
        yield pwd.getpwnam(name)
    finally:
        subprocess.run(["userdel", "--force", "--remove", name], check=False, capture_output=True)


@pytest.fixture(scope="module")
def rootless(podman, podman_environment: dict[str, str], rogue: str) -> Iterator[tuple[pwd.struct_passwd, str]]:
    """An engine that an ordinary user runs, with the image in that user's store."""
    with account(f"merge-gate-{secrets.token_hex(3)}") as user, tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        podman("save", "--quiet", "--output", place / "image.tar", rogue)
        (place / "image.tar").chmod(0o644)
        (place / "containers.conf").write_text(
            '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n', encoding="utf-8"
        )
        os.chown(place, user.pw_uid, user.pw_gid)
        environ = {
            **podman_environment, "HOME": user.pw_dir, "XDG_RUNTIME_DIR": directory,
            "CONTAINERS_CONF_OVERRIDE": str(place / "containers.conf"),
        }  # fmt: skip
        del environ["CONTAINERS_REGISTRIES_CONF"]  # which only root may read
        as_user = ("runuser", "-u", user.pw_name, "--")
        words = [*as_user, "podman", "load", "--quiet", "--input", str(place / "image.tar")]
        subprocess.run(words, env=environ, cwd="/", check=True, capture_output=True)
        with serving(environ, place / "podman.sock", *as_user):
            yield user, f"unix://{place / 'podman.sock'}"
        pause = place / "libpod" / "tmp" / "pause.pid"
        if pause.is_file():
            os.kill(int(pause.read_text()), signal.SIGKILL)


def test_a_rootless_engine_maps_its_root_to_the_user(run: ContainerRun, rootless) -> None:
    """The report belongs to that user, and the token arrives."""
    user, address = rootless
    check_that_the_token_arrives(run)  # which imports what that user may not read on this machine
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(run.workspace, Path(directory, "workspace"))
        for path in (directory, *Path(directory).rglob("*")):
            os.chown(path, user.pw_uid, user.pw_gid)
        config = Path(directory, "workspace", "gate.yml")
        environ = {**run.environ, "DOCKER_HOST": address, "RUNNER_TEMP": directory}
        theirs = replace(run, config=config, workspace=config.parent, output=Path(directory, "report"), environ=environ)
        with Path(directory, "log").open("wb", buffering=0) as log:
            assert as_user(user.pw_uid, lambda: run_in_container(theirs, log.write)) == 3
        said = Path(directory, "log").read_text(encoding="utf-8")
        assert hashlib.sha256(handover.written(handed_over(theirs))).hexdigest() in said
        config.write_text("link notes.txt /etc/passwd", encoding="utf-8")
        assert as_user(user.pw_uid, lambda: run_in_container(theirs, print)) == 0
        owners = {path.name: path.stat().st_uid for path in theirs.output.iterdir()}
        assert owners == {"report.json": user.pw_uid, "summary.md": user.pw_uid}
        assert {path.name for path in Path(directory).iterdir()} == {"workspace", "report", "log"}


def test_over_a_socket_file_the_token_arrives(run: ContainerRun) -> None:
    check_that_the_token_arrives(run)


def test_over_tls_with_a_client_certificate_it_arrives_too(
    run, tls_engine: str, certificates: Path, tmp_path: Path, variables
) -> None:
    """Also where a company's authorities stand in the environment: they are not the engine's."""
    variables["REQUESTS_CA_BUNDLE"] = str(certificates / "client.pem")
    folder = of_a_client(certificates, tmp_path / "tls")
    tls = {"DOCKER_HOST": tls_engine, "DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(folder)}
    check_that_the_token_arrives(replace(run, environ={**run.environ, **tls}))


def test_in_a_docker_context_it_arrives_too(run, tls_engine: str, certificates: Path, tmp_path: Path) -> None:
    settings, name = tmp_path / "docker", "gpu-box"
    folder = hashlib.sha256(name.encode()).hexdigest()
    of_a_client(certificates, settings / "contexts" / "tls" / folder / "docker")
    meta = settings / "contexts" / "meta" / folder / "meta.json"
    meta.parent.mkdir(parents=True)
    endpoint = {"Host": tls_engine, "SkipTLSVerify": False}
    meta.write_text(json.dumps({"Name": name, "Endpoints": {"docker": endpoint}}), encoding="utf-8")
    (settings / "config.json").write_text(json.dumps({"currentContext": name}), encoding="utf-8")
    environ = {key: value for key, value in run.environ.items() if key != "DOCKER_HOST"}
    check_that_the_token_arrives(replace(run, environ={**environ, "DOCKER_CONFIG": str(settings)}))


@pytest.mark.parametrize("given", ["no certificate", "no authority", "no TLS"])
def test_tls_that_does_not_agree_is_a_sentence(
    run, tls_engine: str, certificates: Path, tmp_path: Path, given: str
) -> None:
    folder = of_a_client(certificates, tmp_path / "tls", with_certificate=given != "no certificate")
    if given == "no authority":
        (folder / "ca.pem").write_bytes((certificates / "client.pem").read_bytes())
    tls = {} if given == "no TLS" else {"DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(folder)}
    with pytest.raises(LauncherError, match=r"tcp://.*DOCKER_HOST") as raised:
        run_in_container(replace(run, environ={**run.environ, "DOCKER_HOST": tls_engine, **tls}), print)
    assert raised.value.hint


# --- the first step, on runners that have this SDK or none --------------------------------------------------------

SDKS = ("5.0.3", "6.1.3", "7.1.0")
FOREIGN = "link notes.txt /etc/passwd"


@pytest.fixture
def way(request: pytest.FixtureRequest, certificates: Path, tmp_path: Path) -> tuple[dict[str, str], int]:
    """A way to an engine: the variables that name it, and the user who takes it."""
    if request.param == "rootless":
        user, address = request.getfixturevalue("rootless")
        return {"DOCKER_HOST": address}, user.pw_uid
    if request.param == "tls":
        folder = of_a_client(certificates, tmp_path / "tls")
        tls = {"DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(folder)}
        return {"DOCKER_HOST": request.getfixturevalue("tls_engine"), **tls}, 0
    return {"DOCKER_HOST": "ssh://gpu-box" if request.param == "ssh" else request.getfixturevalue("engine")}, 0


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that an ordinary user can reach."""
    with tempfile.TemporaryDirectory(prefix="runner-") as directory:
        yield Path(directory)


def first_step(python: Path, action: Path, image: str, place: Path, environ: dict[str, str], uid: int) -> str:
    """Run the action's first step in `place` with a runner's Python; return what it printed."""
    for name in ("work", "temp"):
        (place / name).mkdir()
    (place / "work" / "gate.yml").write_text(FOREIGN, encoding="utf-8")
    for path in (place, *place.rglob("*")):
        os.chown(path, uid, uid)
    # This machine's Python may lie where only root may read.
    reads = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *reads, "--"] if uid else []
    done = subprocess.run(
        [*become, python, "-I", action / "entrypoint.py", "action"],
        env={
            "PATH": os.environ["PATH"], "HOME": str(place), "GITHUB_WORKSPACE": str(place / "work"),
            "RUNNER_TEMP": str(place / "temp"), "GITHUB_OUTPUT": str(place / "outputs"),
            "GITHUB_STEP_SUMMARY": str(place / "summary"), "HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_x",
            "MERGE_GATE_INPUT_CONFIG": "gate.yml", "MERGE_GATE_INPUT_RUNTIME": "docker",
            "MERGE_GATE_INPUT_IMAGE": image, "MERGE_GATE_INPUT_OUTPUT": str(place / "report"), **environ,
        },
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.mark.parametrize("sdk", ["none", *SDKS])
@pytest.mark.parametrize("way", ["socket", "tls", "rootless"], indirect=True)
def test_the_first_step_judges_whatever_sdk_the_runner_has(
    home: Path, bare: Path, released: Path, rogue: str, place: Path, way, sdk: str
) -> None:
    """The token arrives, the report belongs to the runner's user, and nothing else is left."""
    environ, uid = way
    python = (bare if sdk == "none" else home / "sdks" / sdk / "bin") / "python"
    said = first_step(python, released, rogue, place, environ, uid)
    assert "merge-gate: result pass" in said, said
    assert hashlib.sha256(handover.written({"HF_TOKEN": "hf_x"})).hexdigest() in said
    assert {path.name: path.stat().st_uid for path in (place / "report").iterdir()} == {
        "report.json": uid, "summary.md": uid,
    }  # fmt: skip
    assert list((place / "temp").iterdir()) == []


@pytest.mark.parametrize("sdk", ["none", *SDKS])
@pytest.mark.parametrize("way", ["ssh"], indirect=True)
def test_the_first_step_refuses_an_engine_elsewhere(
    home: Path, bare: Path, released: Path, place: Path, way, sdk: str
) -> None:
    python = (bare if sdk == "none" else home / "sdks" / sdk / "bin") / "python"
    said = first_step(python, released, "image", place, *way)
    assert "merge-gate: result error" in said
    assert "an engine on another machine cannot see the workspace" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("sdk", "says"),
    [
        ("none", "the Docker SDK for Python"),
        ("5.0.3", "has version 5.0.3, expected 7 or newer"),
        ("6.1.3", "has version 6.1.3, expected 7 or newer"),
        ("7.1.0", "podman=True"),
    ],
)
def test_outside_the_action_an_sdk_that_is_too_old_is_a_sentence(
    home: Path, bare: Path, engine: str, sdk: str, says: str
) -> None:
    """As for `merge-gate run --container`. That the older two are too old is seen first."""
    python = (bare if sdk == "none" else home / "sdks" / sdk / "bin") / "python"

    def run(code: str) -> str:
        words = [python, "-I", "-c", f"import sys; sys.path.append(sys.argv[1]); {code}", ROOT / "src", engine]
        return subprocess.run(words, check=False, capture_output=True, text=True).stderr

    if sdk in {"5.0.3", "6.1.3"}:
        assert "Not supported URL scheme" in run("import docker; docker.DockerClient(base_url=sys.argv[2]).version()")
    ask = "from merge_gate.action.docker import docker_api as d; "
    ask += "sys.stderr.write(str(d.describe(d.connect({'DOCKER_HOST': sys.argv[2]}))))"
    assert says in run(ask)
