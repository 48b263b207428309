"""The engine's address, its answers in words, and its errors as sentences. The engine itself is met in tests/e2e."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import docker
import pytest
import requests

from merge_gate.action import docker_api
from merge_gate.errors import LauncherError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[str]:
    """A socket at which somebody says OK."""
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


def test_a_known_socket_is_found(answering: str, tmp_path: Path) -> None:
    environ = {"XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path / "home")}
    found = docker_api.find_address(environ)
    if not found.startswith(("unix:///var/run/docker", "unix:///run/podman")):  # this machine's own engine comes first
        assert found == f"unix://{answering}"


def test_docker_host_decides(answering: str) -> None:
    assert docker_api.find_address({"DOCKER_HOST": "ssh://gpu-box"}) == "ssh://gpu-box"
    assert docker_api.answers({"DOCKER_HOST": "ssh://gpu-box"}), "set on purpose: tried, not asked"
    assert docker_api.answers({"DOCKER_HOST": f"unix://{answering}"})
    assert not docker_api.answers({"DOCKER_HOST": f"unix://{answering}.other"})


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


def test_an_error_in_the_midst_of_a_pull() -> None:
    with pytest.raises(LauncherError, match="manifest unknown"):
        list(docker_api.progress(iter([{"status": "Pulling"}, {"error": "manifest unknown"}])))


@pytest.mark.parametrize(
    ("said", "gpus", "message", "hint"),
    [
        (
            'could not select device driver "" with capabilities: [[gpu]]',
            "all",
            r"the GPUs asked for \(all\)",
            "Toolkit",
        ),
        ("unresolvable CDI devices nvidia.com/gpu=0", "0", r"the GPUs asked for \(0\)", "CDI"),
        ("unresolvable CDI devices nvidia.com/gpu=0", "", "cannot be made: unresolvable", ""),
        ("invalid mount config: bind source path does not exist: /x", "", "does not exist: /x", "runtime: native"),
        ("no space left on device", "", "cannot be made: no space left", ""),
    ],
)
def test_the_engines_errors_are_sentences(said: str, gpus: str, message: str, hint: str) -> None:
    with pytest.raises(LauncherError, match=message) as raised, docker_api.translated("it cannot be made", gpus=gpus):
        raise docker.errors.APIError("500 Server Error", explanation=said)
    assert hint in raised.value.hint


def test_a_lost_connection_is_a_sentence_too() -> None:
    with pytest.raises(LauncherError, match="it was lost: Connection aborted"), docker_api.translated("it was lost"):
        raise requests.ConnectionError("Connection aborted")
