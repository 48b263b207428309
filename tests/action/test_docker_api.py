"""Where the engine is, its answers in words, and its errors as sentences. The engine itself is met in tests/e2e."""

import hashlib
import json
import re
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import docker
import pytest

from merge_gate._internal.errors import LauncherError
from merge_gate.action.docker import docker_api
from merge_gate.action.docker.docker_api import Address
from tests.support.wording import Wording

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements" / "launcher.txt"


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A user of this machine who sees none of its own sockets."""
    here = tuple(template for template in docker_api.SOCKETS if template.startswith("{"))
    monkeypatch.setattr(docker_api, "SOCKETS", here)
    return {"XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path / "home")}


def test_an_address_that_was_set_on_purpose_is_tried_not_asked(tmp_path: Path) -> None:
    assert docker_api.answers({"DOCKER_HOST": "ssh://gpu-box"})
    assert not docker_api.answers({"DOCKER_HOST": f"unix://{tmp_path}/nowhere.sock"})


@pytest.mark.parametrize(
    ("given", "sdk"),
    [
        pytest.param({"DOCKER_HOST": "ssh://gpu-box"}, docker, id="an engine behind ssh"),
        pytest.param({"DOCKER_CONFIG": "/nowhere"}, docker, id="no engine"),
        pytest.param({"DOCKER_HOST": "unix:///nowhere"}, None, id="no SDK"),
        pytest.param({"DOCKER_HOST": "unix:///nowhere"}, SimpleNamespace(__version__="odd"), id="an SDK of no version"),
    ],
)
def test_without_an_engine_or_an_sdk_there_is_a_sentence(environ, given, sdk, monkeypatch, wording) -> None:
    monkeypatch.setitem(sys.modules, "docker", sdk)
    with wording.of(LauncherError):
        docker_api.connect({**environ, **given})


def test_an_engine_behind_tls_without_certificates_is_a_sentence(tmp_path: Path) -> None:
    for name in ("ca.pem", "cert.pem", "key.pem"):
        (tmp_path / name).write_text("none", encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        environ = {"DOCKER_HOST": url, "DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(tmp_path)}
        with pytest.raises(LauncherError, match=rf"{url} .*(?i:certificate)"):
            docker_api.connect(environ)


@pytest.mark.parametrize(
    ("said", "gpus"),
    [
        ('could not select device driver "" with capabilities: [[gpu]]', "all"),
        ("unresolvable CDI devices nvidia.com/gpu=0", "0"),
        ("unresolvable CDI devices nvidia.com/gpu=0", ""),
        ("invalid mount config: bind source path does not exist: /x", ""),
        ("no matching manifest for linux/arm64/v8 in the manifest list", ""),
        ("exec /opt/merge-gate/bin/python: exec format error", ""),
        ("no space left on device", ""),
    ],
    ids=["no driver", "no CDI device", "CDI unasked", "no mount", "no architecture", "exec format", "no space"],
)
def test_the_engines_errors_are_sentences(said: str, gpus: str, wording: Wording) -> None:
    with pytest.raises(LauncherError) as raised, docker_api.translated("it cannot be made", gpus=gpus):
        raise docker.errors.APIError("500 Server Error", explanation=said)
    wording(raised.value)


class LyingEngine:
    """A client whose engine answers with JSON of another shape."""

    def __init__(self, answer: object) -> None:
        self.answer, self.api = answer, self

    def version(self) -> object:
        return self.answer

    info = version

    def inspect_image(self, _name: str) -> object:
        return self.answer

    def containers(self, **_options: object) -> object:
        return self.answer


@pytest.mark.parametrize("answer", [None, 3, "x", [3], {"Components": [3]}, {"Components": 1}])
def test_odd_answers_of_an_engine_are_a_sentence(answer: object, wording: Wording) -> None:
    client = LyingEngine(answer)
    for ask in (
        docker_api.describe,
        lambda client: docker_api.ensure_image(client, "image", print),
        lambda client: docker_api.labelled(client, {"a": "b"}),
    ):
        with wording.of(LauncherError):
            ask(client)


@pytest.mark.parametrize(
    ("known", "image", "identity"),
    [
        ([], "merge-gate:cpu", "sha256:1"),
        (["host/a@sha256:2"], "merge-gate:cpu", "sha256:1"),
        (["host/a@sha256:2", "merge-gate@sha256:3"], "merge-gate:cpu", "merge-gate@sha256:3"),
        (["a/b@sha256:2", "a/b@sha256:3"], "a/b@sha256:3", "a/b@sha256:3"),
    ],
)
def test_an_image_is_known_by_its_digest(known: list[str], image: str, identity: str) -> None:
    client = LyingEngine({"Id": "sha256:1", "RepoDigests": known})
    assert docker_api.ensure_image(client, image, print) == identity


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[str]:
    """A socket that says OK."""
    path = tmp_path / "podman" / "podman.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def answer() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1024)
                    connection.sendall(b"HTTP/1.0 200 OK\r\n\r\nOK")

        threading.Thread(target=answer, daemon=True).start()
        yield str(path)
        server.shutdown(socket.SHUT_RDWR)


def dead(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def make_context(home: Path, name: str, host: str, *files: str, **more: object) -> None:
    folder = hashlib.sha256(name.encode()).hexdigest()
    meta = home / ".docker" / "contexts" / "meta" / folder
    meta.mkdir(parents=True)
    endpoint = {"Host": host, **more}
    (meta / "meta.json").write_text(json.dumps({"Name": name, "Endpoints": {"docker": endpoint}}), encoding="utf-8")
    for file in files:
        path = home / ".docker" / "contexts" / "tls" / folder / "docker" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_the_socket_that_answers_is_found(environ, answering: str, tmp_path: Path) -> None:
    """A dead socket does not hide it. Another user's directory cannot be looked at; here, its name is too long."""
    dead(tmp_path / "docker.sock")
    for given in ({}, {"HOME": "/" + "x" * 5000}, {"DOCKER_CONTEXT": "default"}):
        found = docker_api.find_address({**environ, **given})
        assert found
        assert found.url == f"unix://{answering}"
    named = docker_api.find_address({**environ, "DOCKER_HOST": "tcp://box:2375"})
    assert named == Address("tcp://box:2375", "DOCKER_HOST")


def test_a_dead_socket_alone_is_named(environ, tmp_path: Path) -> None:
    dead(tmp_path / "docker.sock")
    found = docker_api.find_address(environ)
    assert found
    assert found.url == f"unix://{tmp_path}/docker.sock"
    assert docker_api.unreachable(found) == "Connection refused"
    assert not docker_api.answers({"DOCKER_HOST": found.url})


@pytest.mark.parametrize("verify", [True, False])
def test_tls_is_taken_from_the_environment(environ, tmp_path: Path, verify: bool) -> None:
    for name in ("ca.pem", "cert.pem", "key.pem"):
        (tmp_path / name).touch()
    given = {**environ, "DOCKER_HOST": "tcp://box:2376", "DOCKER_CERT_PATH": str(tmp_path)}
    found = docker_api.find_address({**given, "DOCKER_TLS_VERIFY": "1"} if verify else given)
    assert found
    ca, cert, key = (str(tmp_path / name) for name in ("ca.pem", "cert.pem", "key.pem"))
    assert found.tls == {"ca_cert": ca, "client_cert": (cert, key), "verify": verify}


def test_tls_without_a_directory_reads_the_users_own(environ, tmp_path: Path) -> None:
    (tmp_path / "home" / ".docker").mkdir(parents=True)
    (tmp_path / "home" / ".docker" / "ca.pem").touch()
    found = docker_api.find_address({**environ, "DOCKER_HOST": "tcp://box:2376", "DOCKER_TLS_VERIFY": "1"})
    assert found
    authority = str(tmp_path / "home" / ".docker" / "ca.pem")
    assert found.tls == {"ca_cert": authority, "client_cert": None, "verify": True}


def test_a_context_that_is_in_use(environ, tmp_path: Path, wording: Wording) -> None:
    home = tmp_path / "home"
    make_context(home, "gpu-box", "tcp://gpu:2376", "ca.pem", "cert.pem", "key.pem")
    make_context(home, "other", "unix:///other.sock", SkipTLSVerify=False)
    other = docker_api.find_address({**environ, "DOCKER_CONTEXT": "other"})
    assert other
    assert (other.url, other.tls) == ("unix:///other.sock", None)
    wording(other.origin)
    (home / ".docker" / "config.json").write_text('{"currentContext": "gpu-box"}', encoding="utf-8")
    found = docker_api.find_address(environ)
    assert found
    assert found.url == "tcp://gpu:2376"
    wording(found.origin)
    assert found.tls
    assert found.tls["verify"]
    assert found.tls["client_cert"][0].endswith("/docker/cert.pem")
    assert docker_api.find_address({**environ, "DOCKER_HOST": "unix:///x"}) == Address("unix:///x", "DOCKER_HOST")


def test_a_context_that_is_not_there(environ, wording: Wording) -> None:
    with wording.of(LauncherError):
        docker_api.find_address({**environ, "DOCKER_CONTEXT": "gone"})


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"currentContext": 3}', "{}"])
def test_a_configuration_that_says_nothing(environ, tmp_path: Path, text: str | None) -> None:
    (tmp_path / "home" / ".docker").mkdir(parents=True)
    if text is not None:
        (tmp_path / "home" / ".docker" / "config.json").write_text(text, encoding="utf-8")
    assert docker_api.find_address(environ) is None


def locked() -> dict[str, set[str]]:
    """Package and version → SHA-256 of its files."""
    entries = LOCK.read_text(encoding="utf-8").replace("\\\n", "").splitlines()
    return {entry.split()[0]: set(re.findall(r"sha256:([0-9a-f]{64})", entry)) for entry in entries}


def test_every_wheel_is_one_of_the_lock_and_the_other_way_round() -> None:
    wheels = sorted(docker_api.VENDOR.iterdir())
    named = {"{}=={}".format(*wheel.name.replace("_", "-").split("-py3")[0].rsplit("-", 1)): wheel for wheel in wheels}
    assert set(named) == set(locked())
    for name, wheel in named.items():
        assert wheel.name.endswith("-py3-none-any.whl"), "imported as it lies there, on any machine"
        assert hashlib.sha256(wheel.read_bytes()).hexdigest() in locked()[name], f"run .ci/vendor.sh ({name})"


@pytest.mark.parametrize("own", [None, "99.0"])
def test_whatever_sdk_the_runner_has_the_actions_own_is_used(tmp_path: Path, own: str | None) -> None:
    if own:
        (tmp_path / "site" / "docker").mkdir(parents=True)
        (tmp_path / "site" / "docker" / "__init__.py").write_text(f"__version__ = {own!r}\n", encoding="utf-8")
    temp = tmp_path / "temp"
    temp.mkdir()
    code = """
        import sys
        sys.path[:0] = sys.argv[1:3]
        from merge_gate.action.docker import docker_api
        before = list(sys.path)
        with docker_api.vendored_sdk({"RUNNER_TEMP": sys.argv[3]}):
            import docker
            print(docker.__version__, docker.__file__)
        assert sys.path == before
    """
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", textwrap.dedent(code), ROOT / "src", tmp_path / "site", temp],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    version, file = done.stdout.split()
    assert f"docker=={version}" in locked()
    assert file.startswith(str(docker_api.VENDOR))
    assert list(temp.iterdir()) == [], "nothing is left"
