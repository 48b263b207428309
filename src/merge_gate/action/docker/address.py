"""Finds the address of the container engine like the docker command line, without the SDK.

The order: DOCKER_HOST (with DOCKER_TLS_VERIFY and DOCKER_CERT_PATH), then the context that DOCKER_CONTEXT or docker's
configuration names, then the first known socket that answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate.errors import LauncherError

if TYPE_CHECKING:
    from collections.abc import Mapping

_PING_S = 5
_SOCKETS = (
    "/var/run/docker.sock", "{home}/.docker/run/docker.sock", "{runtime}/docker.sock",
    "/run/podman/podman.sock", "{runtime}/podman/podman.sock",
)  # fmt: skip


@dataclass(frozen=True)
class Tls:
    """The files of a TLS connection; empty if there are none. `verify`: whether the engine's certificate is checked."""

    authority: str
    certificate: str
    key: str
    verify: bool


@dataclass(frozen=True)
class Address:
    """An engine's address. `url` is `unix://…`, `tcp://…` or another scheme. `origin` says in words what named it."""

    url: str
    origin: str
    tls: Tls | None = None


def find(environ: Mapping[str, str]) -> Address | None:
    """Return the engine's address; None if there is none. Raises `LauncherError` for a missing context."""
    if environ.get("DOCKER_HOST"):
        return Address(environ["DOCKER_HOST"], "DOCKER_HOST", _tls_of_environment(environ))
    settings = Path(environ.get("DOCKER_CONFIG") or _home(environ) / ".docker")
    context = environ.get("DOCKER_CONTEXT") or _current_context(settings)
    if context and context != "default":
        return _of_context(settings, context)
    return _known_socket(environ)


def unreachable(address: Address) -> str:
    """Return the reason why a socket file does not answer; empty if it answers, or if the address is not a file."""
    if not address.url.startswith("unix://"):
        return ""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_PING_S)
            connection.connect(address.url[len("unix://") :])
            connection.sendall(b"GET /_ping HTTP/1.0\r\nHost: engine\r\n\r\n")
            return "" if b" 200 " in connection.recv(64) else "it is not a container engine"
    except OSError as error:
        return error.strerror or str(error)


def _home(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("HOME") or Path.home())


def _tls_of_environment(environ: Mapping[str, str]) -> Tls | None:
    verify, folder = bool(environ.get("DOCKER_TLS_VERIFY")), environ.get("DOCKER_CERT_PATH")
    if not verify and not folder:
        return None
    return _tls(Path(folder or _home(environ) / ".docker"), verify=verify)


def _tls(folder: Path, *, verify: bool) -> Tls:
    names = (folder / name for name in ("ca.pem", "cert.pem", "key.pem"))
    authority, certificate, key = (str(path) if path.is_file() else "" for path in names)
    return Tls(authority, certificate, key, verify)


def _current_context(settings: Path) -> str:
    """The context that `docker context use` chose; empty if the file is missing or invalid."""
    try:
        chosen = json.loads((settings / "config.json").read_bytes()).get("currentContext")
    except (OSError, ValueError, AttributeError):
        return ""
    return chosen if isinstance(chosen, str) else ""


def _of_context(settings: Path, name: str) -> Address:
    """Read one context. Its directory is named by the SHA-256 of its name (docker/cli, cli/context/store)."""
    folder = hashlib.sha256(name.encode()).hexdigest()
    path = settings / "contexts" / "meta" / folder / "meta.json"
    try:
        endpoint: dict[str, Any] = json.loads(path.read_bytes())["Endpoints"]["docker"]
        url = str(endpoint["Host"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LauncherError(
            f"the docker context {name!r} cannot be read from {path} ({type(error).__name__})",
            hint="check `docker context ls`; set DOCKER_HOST, or set DOCKER_CONTEXT to another context",
        ) from error
    files = settings / "contexts" / "tls" / folder / "docker"
    tls = _tls(files, verify=not endpoint.get("SkipTLSVerify")) if files.is_dir() else None
    return Address(url, f"the docker context {name!r}", tls)


def _known_socket(environ: Mapping[str, str]) -> Address | None:
    """The first socket that answers, or else the first that exists, so that an error can name it."""
    places = {
        "home": str(_home(environ)),
        "runtime": environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}",
    }
    paths = [Path(template.format(**places)) for template in _SOCKETS]
    sockets = [Address(f"unix://{path}", "a socket of this machine") for path in paths if _is_socket(path)]
    return next((address for address in sockets if not unreachable(address)), sockets[0] if sockets else None)


def _is_socket(path: Path) -> bool:
    try:
        return path.is_socket()
    except OSError:  # another user's directory
        return False
