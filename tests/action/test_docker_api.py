"""The engine's answers in words, and its errors as sentences. The engine itself is met in tests/e2e."""

from __future__ import annotations

import socket
import sys
import tomllib
from pathlib import Path

import docker
import pytest
import requests

from merge_gate.action.docker import docker_api
from merge_gate.errors import LauncherError
from tests.support.wording import Wording

ROOT = Path(__file__).parents[2]


def needed() -> str:
    (requirement,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][
        "launcher"
    ]
    return str(requirement)


def test_an_address_that_was_set_on_purpose_is_tried_not_asked(tmp_path: Path) -> None:
    assert docker_api.answers({"DOCKER_HOST": "ssh://gpu-box"})
    assert not docker_api.answers({"DOCKER_HOST": f"unix://{tmp_path}/nowhere.sock"})


def test_an_engine_behind_ssh_is_refused_in_a_sentence(wording: Wording) -> None:
    with pytest.raises(LauncherError) as raised:
        docker_api.connect({"DOCKER_HOST": "ssh://gpu-box"})
    wording(raised.value)
    wording(raised.value.hint)


def test_a_machine_without_an_engine_is_a_sentence(monkeypatch: pytest.MonkeyPatch, wording: Wording) -> None:
    monkeypatch.setattr(docker_api.addresses, "_SOCKETS", ())
    with pytest.raises(LauncherError) as raised:
        docker_api.connect({"DOCKER_CONFIG": "/nowhere"})
    wording(raised.value)
    wording(raised.value.hint)


def test_no_sdk_is_a_sentence(monkeypatch: pytest.MonkeyPatch, wording: Wording) -> None:
    monkeypatch.setitem(sys.modules, "docker", None)
    with pytest.raises(LauncherError) as raised:
        docker_api.connect({"DOCKER_HOST": "unix:///nowhere"})
    wording(raised.value)
    wording(raised.value.hint)


def test_an_engine_behind_tls_whose_files_are_no_certificates_is_a_sentence(tmp_path: Path) -> None:
    for name in ("ca.pem", "cert.pem", "key.pem"):
        (tmp_path / name).write_text("none", encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        environ = {"DOCKER_HOST": url, "DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(tmp_path)}
        with pytest.raises(LauncherError, match=rf"{url} .*(?i:certificate)"):
            docker_api.connect(environ)


def test_an_sdk_of_no_version_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch, wording: Wording) -> None:
    monkeypatch.setattr(docker, "__version__", "odd")
    with pytest.raises(LauncherError) as raised:
        docker_api.connect({"DOCKER_HOST": "unix:///nowhere"})
    wording(raised.value)
    wording(raised.value.hint)


def test_a_socket_of_something_else_is_no_engine(tmp_path: Path) -> None:
    address = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(address))
    assert not docker_api.answers({"DOCKER_HOST": f"unix://{address}"})


@pytest.mark.parametrize(
    ("image", "name", "tag"),
    [
        ("merge-gate", "merge-gate", "latest"),
        ("merge-gate:cpu", "merge-gate", "cpu"),
        ("host:5000/a/b", "host:5000/a/b", "latest"),
        ("host:5000/a/b:1", "host:5000/a/b", "1"),
        ("ghcr.io/a/b@sha256:00", "ghcr.io/a/b", "sha256:00"),
    ],
)
def test_names_of_images(image: str, name: str, tag: str) -> None:
    assert docker_api.name_and_tag(image) == (name, tag)


def test_progress_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_api, "_PROGRESS_S", 0.0)
    events = [
        {"status": "Pulling from acme/merge-gate"},
        {"status": "Downloading", "id": "a", "progressDetail": {"current": 1_000_000, "total": 4_000_000}},
        {"status": "Downloading", "id": "b", "progressDetail": {"current": 2_000_000, "total": 6_000_000}},
        {"status": "Download complete", "id": "a", "progressDetail": {}},
    ]
    assert list(docker_api.progress(iter(events)))[:2] == ["pulling: 1 of 4 MB\n", "pulling: 3 of 10 MB\n"]


def test_an_error_in_the_midst_of_a_pull(wording: Wording) -> None:
    with pytest.raises(LauncherError) as caught:
        list(docker_api.progress(iter([{"status": "Pulling"}, {"error": "manifest unknown"}])))
    wording(caught.value)


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


def test_a_lost_connection_is_a_sentence_too(wording: Wording) -> None:
    with pytest.raises(LauncherError) as caught, docker_api.translated("it was lost"):
        raise requests.ConnectionError("Connection aborted")
    wording(caught.value)


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
        with pytest.raises(LauncherError) as caught:
            ask(client)
        wording(caught.value)


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
