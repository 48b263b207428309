"""Where the engine is: as the docker command line finds it."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from merge_gate.action.docker import address
from merge_gate.action.docker.address import Address, Tls
from merge_gate.errors import LauncherError
from tests.support.wording import Wording

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


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A user of this machine who sees none of its own sockets."""
    here = tuple(template for template in address._SOCKETS if template.startswith("{"))
    monkeypatch.setattr(address, "_SOCKETS", here)
    return {"XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path / "home")}


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


def test_nothing_is_found_where_nothing_is(environ: dict[str, str]) -> None:
    assert address.find(environ) is None


def test_a_place_that_cannot_be_looked_at_is_passed_over(environ, answering: str) -> None:
    """Another user's directory; here, one whose name is too long."""
    assert address.find({**environ, "HOME": "/" + "x" * 5000}) == address.find(environ)


def test_a_known_socket_is_found(environ: dict[str, str], answering: str) -> None:
    found = address.find(environ)
    assert found
    assert found.url == f"unix://{answering}"


def test_a_dead_socket_does_not_hide_one_that_answers(environ, answering: str, tmp_path: Path) -> None:
    dead(tmp_path / "docker.sock")
    found = address.find(environ)
    assert found
    assert found.url == f"unix://{answering}"


def test_a_dead_socket_alone_is_named(environ, tmp_path: Path) -> None:
    dead(tmp_path / "docker.sock")
    found = address.find(environ)
    assert found
    assert found.url == f"unix://{tmp_path}/docker.sock"
    assert address.unreachable(found) == "Connection refused"


def test_docker_host_decides(environ, answering: str) -> None:
    assert address.find({**environ, "DOCKER_HOST": "tcp://box:2375"}) == Address("tcp://box:2375", "DOCKER_HOST")


@pytest.mark.parametrize("verify", [True, False])
def test_tls_is_taken_from_the_environment(environ, tmp_path: Path, verify: bool) -> None:
    for name in ("ca.pem", "cert.pem", "key.pem"):
        (tmp_path / name).touch()
    given = {**environ, "DOCKER_HOST": "tcp://box:2376", "DOCKER_CERT_PATH": str(tmp_path)}
    found = address.find({**given, "DOCKER_TLS_VERIFY": "1"} if verify else given)
    assert found
    ca, cert, key = (str(tmp_path / name) for name in ("ca.pem", "cert.pem", "key.pem"))
    assert found.tls == Tls(ca, cert, key, verify)


def test_tls_without_a_directory_reads_the_users_own(environ, tmp_path: Path) -> None:
    (tmp_path / "home" / ".docker").mkdir(parents=True)
    (tmp_path / "home" / ".docker" / "ca.pem").touch()
    found = address.find({**environ, "DOCKER_HOST": "tcp://box:2376", "DOCKER_TLS_VERIFY": "1"})
    assert found
    assert found.tls == Tls(str(tmp_path / "home" / ".docker" / "ca.pem"), "", "", verify=True)


def test_a_context_that_is_in_use(environ, answering: str, tmp_path: Path, wording: Wording) -> None:
    home = tmp_path / "home"
    make_context(home, "gpu-box", "tcp://gpu:2376", "ca.pem", "cert.pem", "key.pem")
    make_context(home, "other", "unix:///other.sock", SkipTLSVerify=False)
    other = address.find({**environ, "DOCKER_CONTEXT": "other"})
    assert other
    assert (other.url, other.tls) == ("unix:///other.sock", None)
    wording(other.origin)
    (home / ".docker" / "config.json").write_text('{"currentContext": "gpu-box"}', encoding="utf-8")
    found = address.find(environ)
    assert found
    assert found.url == "tcp://gpu:2376"
    wording(found.origin)
    assert found.tls
    assert found.tls.verify
    assert found.tls.certificate.endswith("/docker/cert.pem")
    default = address.find({**environ, "DOCKER_CONTEXT": "default"})
    assert default
    assert default.url == f"unix://{answering}"
    assert address.find({**environ, "DOCKER_HOST": "unix:///x"}) == Address("unix:///x", "DOCKER_HOST")


def test_a_context_that_is_not_there(environ, wording: Wording) -> None:
    with pytest.raises(LauncherError) as raised:
        address.find({**environ, "DOCKER_CONTEXT": "gone"})
    wording(raised.value)
    wording(raised.value.hint)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"currentContext": 3}', "{}"])
def test_a_configuration_that_says_nothing(environ, tmp_path: Path, text: str) -> None:
    (tmp_path / "home" / ".docker").mkdir(parents=True)
    (tmp_path / "home" / ".docker" / "config.json").write_text(text, encoding="utf-8")
    assert address.find(environ) is None
