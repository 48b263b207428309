"""What the end-to-end tests share: tools, an engine, the image, the demo's files. A missing tool is a failure."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from merge_gate.action.docker.container import ContainerRun
from merge_gate.demo import make_demo
from tests.support.e2e.act import ROOT, TAG, ActRun, copy_action, free_port, make_repository, run_act
from tests.support.e2e.engines import BASE_IMAGE, pip_settings, serving
from tests.support.e2e.launch import TOKEN
from tests.support.e2e.proxy import HUB_NAME

IMAGE = f"localhost/merge-gate:{TAG}"
ROGUE = f"localhost/merge-gate-rogue:{TAG}"
GREEN = "version: 1\nbase: {model: ./base, dtype: float16}\nadapters:\n  - ./adapters/good\n"


@pytest.fixture(scope="session")
def home() -> Path:
    """Where .ci/install-e2e.sh put its tools."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(os.environ.get("MERGE_GATE_E2E_HOME") or Path(cache) / "merge-gate-e2e")
    assert (directory / "tools" / "bin" / "act").is_file(), f"no tools in {directory}: run .ci/install-e2e.sh first"
    return directory


@pytest.fixture(scope="session")
def tool(home: Path):
    return lambda name: home / "tools" / "bin" / name


@pytest.fixture(scope="session")
def installed() -> Path:
    """The directory of a python3 that has merge-gate: a runner after `pip install merge-gate`."""
    return Path(sys.executable).parent


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a python3 that has no packages: a plain runner."""
    directory = tmp_path_factory.mktemp("bare") / "python"
    venv.create(directory)
    return directory / "bin"


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base, adapters and configuration, and beside it one configuration that is green."""
    directory = tmp_path_factory.mktemp("demo") / "gate"
    make_demo(directory)
    (directory / "green.yml").write_text(GREEN, encoding="utf-8")
    return directory


@pytest.fixture
def own_repository(repository: Path) -> Path:
    """A checkout of the action itself, with adapters in it."""
    copy_action(repository)
    return repository


@pytest.fixture
def repository(tmp_path: Path, demo: Path) -> Path:
    """A checkout of somebody's adapters."""
    directory = tmp_path / "repository"
    directory.mkdir()
    shutil.copytree(demo, directory / "gate")
    return directory


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The action as a release has it."""
    directory = tmp_path_factory.mktemp("released") / "merge-gate"
    directory.mkdir()
    copy_action(directory)
    return directory


@pytest.fixture
def play(tool, tmp_path: Path, installed: Path, released: Path):
    """Run a workflow in a directory, which becomes a repository. The runner has merge-gate, if nothing else is said."""

    def play(repository: Path, workflow: str, scratch: Path = tmp_path / "run", text: str = "", **options) -> ActRun:
        make_repository(repository, workflow, text)
        options = {"python": installed, "consumer_of": released, **options}
        return run_act(tool("act"), repository, workflow, scratch, **options)

    return play


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate authority, and what it has signed for servers of this machine and for a client."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *curve, "-keyout", "ca-key.pem", "-out", "ca.pem", "-subj", "/CN=authority")
    names = f"subjectAltName=IP:127.0.0.1,DNS:{HUB_NAME},DNS:*.{HUB_NAME}"
    for name, extension in (("server", names), ("client", "extendedKeyUsage=clientAuth")):
        openssl("req", *curve, "-keyout", f"{name}-key.pem", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (folder / f"{name}.ext").write_text(extension, encoding="utf-8")
        openssl(
            "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca-key.pem", "-CAcreateserial",
            "-out", f"{name}.pem", "-extfile", f"{name}.ext",
        )  # fmt: skip
    return folder


# --- the engine ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def registry_port() -> int:
    return free_port()


@pytest.fixture(scope="session")
def podman_environment(home: Path, registry_port: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    registries = tmp_path_factory.mktemp("registries") / "registries.conf"
    registries.write_text(f'[[registry]]\nlocation = "127.0.0.1:{registry_port}"\ninsecure = true\n', encoding="utf-8")
    return {
        **os.environ,
        "CONTAINERS_CONF_OVERRIDE": str(home / "containers.conf"),
        "CONTAINERS_REGISTRIES_CONF": str(registries),
        "PODMAN_IGNORE_CGROUPSV1_WARNING": "1",
    }


@pytest.fixture(scope="session")
def podman(podman_environment: dict[str, str]):
    def run(*words: object, check: bool = True) -> str:
        done = subprocess.run(
            ["podman", *map(str, words)], env=podman_environment, check=False, capture_output=True, text=True
        )
        assert not check or done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run


@pytest.fixture(scope="session")
def engine(podman_environment: dict[str, str]) -> Iterator[str]:
    """An engine that other users may talk to as well; the value is DOCKER_HOST."""
    with tempfile.TemporaryDirectory(prefix="engine-") as directory:
        Path(directory).chmod(0o755)
        socket = Path(directory) / "podman.sock"
        with serving(podman_environment, socket):
            socket.chmod(0o666)
            yield f"unix://{socket}"


@pytest.fixture(scope="session")
def image(podman, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The image, built from the real Dockerfile on the local base; pip's settings are this machine's, as mounts."""
    secret = tmp_path_factory.mktemp("pip") / "pip.conf"
    settings = pip_settings()
    secret.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()), encoding="utf-8")
    links = (path for path in settings.get("find-links", "").split() if Path(path).is_dir())
    directories = {"/etc/ssl/certs", *links}
    # buildah caps a build's limits below this machine's otherwise, and RUN fails.
    limits = [f"--ulimit={name}={_hard(flag)}:{_hard(flag)}" for name, flag in (("nofile", "n"), ("nproc", "u"))]
    files = sorted(path for path in (ROOT / "src").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    revision = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    podman(
        "build", "--network=host", "--pull=never", *limits,
        *(f"--volume={directory}:{directory}:ro" for directory in sorted(directories)),
        f"--secret=id=pip-conf,src={secret}",
        f"--build-arg=BASE_IMAGE={BASE_IMAGE}", "--build-arg=TORCH_INDEX=", "--build-arg=VERSION=0.0.1",
        f"--build-arg=REVISION={revision}",
        f"--tag={IMAGE}", ROOT,
    )  # fmt: skip
    yield IMAGE
    podman("untag", IMAGE, IMAGE)  # without the second, each name that the same bytes have, another run's too


@pytest.fixture(scope="session")
def rogue(podman, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An image whose code is hostile, and small: it has no torch."""
    context = tmp_path_factory.mktemp("rogue")
    (context / "rogue.py").write_bytes((ROOT / "tests/support/e2e/rogue.py").read_bytes())
    (context / "Containerfile").write_text(
        f'FROM {BASE_IMAGE}\nCOPY rogue.py /\nENTRYPOINT ["python3", "-I", "/rogue.py"]\n', encoding="utf-8"
    )
    podman("build", "--pull=never", f"--tag={ROGUE}", context)
    yield ROGUE
    podman("untag", ROGUE, ROGUE)


@pytest.fixture
def rogue_run(engine: str, rogue: str, tmp_path: Path) -> ContainerRun:
    """A container of that image with a token. `gate.yml`, which says what it does, is still to be written."""
    for name in ("workspace", "temp"):
        (tmp_path / name).mkdir()
    environ = {
        "DOCKER_HOST": engine, "HF_HUB_OFFLINE": "1", "RUNNER_TEMP": str(tmp_path / "temp"), "HOME": "/nowhere",
        "HF_TOKEN": TOKEN,
    }  # fmt: skip
    config, output = tmp_path / "workspace" / "gate.yml", tmp_path / "report"
    return ContainerRun(config=config, output=output, workspace=config.parent, image=rogue, environ=environ)


def _hard(flag: str) -> str:
    return subprocess.run(["bash", "-c", f"ulimit -H{flag}"], check=True, capture_output=True, text=True).stdout.strip()
