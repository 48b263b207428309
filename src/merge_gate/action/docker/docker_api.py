"""Talks to the container engine, Docker or podman. The only module that imports the Docker SDK.

It finds the engine like the docker command line, connects, describes it, pulls images, and lists and removes
containers. Every exception of the SDK, and every unexpected answer, becomes a `LauncherError`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import re
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate._internal.errors import GateError, LauncherError
from merge_gate.action.docker.handover import GPU_HINT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, MutableMapping

VENDOR = Path(__file__).resolve().parents[4] / "vendor"
"""The wheels of the SDK in the action's checkout. A merge-gate installed by pip has none."""

_ASK_S = 30
_PING_S = 5
SOCKETS = (
    "/var/run/docker.sock", "{home}/.docker/run/docker.sock", "{runtime}/docker.sock",
    "/run/podman/podman.sock", "{runtime}/podman/podman.sock",
)  # fmt: skip
_OLDEST_SDK = 7
_NEEDED = "docker>=7.1"
PROGRESS_S = 5.0
_REASON_LENGTH = 400
_LIST_ATTEMPTS = 4
_LIST_PAUSE_S = 0.5


@dataclass(frozen=True)
class Engine:
    """The facts about an engine that matter here."""

    podman: bool
    rootless: bool
    remapped: bool
    selinux: bool
    nvidia_runtime: bool
    cdi_gpus: bool


# --- the address of the engine ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Address:
    """An engine's address.

    `url` is `unix://…`, `tcp://…` or another scheme. `origin` says in words what named it. `tls` has the arguments of
    the SDK's `TLSConfig`.
    """

    url: str
    origin: str
    tls: Mapping[str, Any] | None = None


def find_address(environ: Mapping[str, str]) -> Address | None:
    """Return the engine's address; None if there is none. Raises `LauncherError` for a missing context.

    The order: DOCKER_HOST (with DOCKER_TLS_VERIFY and DOCKER_CERT_PATH), then the context that DOCKER_CONTEXT or
    docker's configuration names, then the first known socket that answers.
    """
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


def _tls_of_environment(environ: Mapping[str, str]) -> Mapping[str, Any] | None:
    verify, folder = bool(environ.get("DOCKER_TLS_VERIFY")), environ.get("DOCKER_CERT_PATH")
    if not verify and not folder:
        return None
    return _tls(Path(folder or _home(environ) / ".docker"), verify=verify)


def _tls(folder: Path, *, verify: bool) -> Mapping[str, Any]:
    names = (folder / name for name in ("ca.pem", "cert.pem", "key.pem"))
    authority, certificate, key = (str(path) if path.is_file() else None for path in names)
    pair = (certificate, key) if certificate and key else None
    return {"ca_cert": authority, "client_cert": pair, "verify": verify}


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
    paths = [Path(template.format(**places)) for template in SOCKETS]
    paths = [path for path in paths if os.path.exists(path) and path.is_socket()]  # noqa: PTH110 - never raises
    sockets = [Address(f"unix://{path}", "a socket of this machine") for path in paths]
    return next((address for address in sockets if not unreachable(address)), sockets[0] if sockets else None)


# --- the engine ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def vendored_sdk(environ: Mapping[str, str], vendor: Path = VENDOR) -> Iterator[None]:
    """Put the wheels of the SDK on the path, before any package of the runner. Nothing is downloaded.

    certifi unpacks its file on import, below RUNNER_TEMP if that is set.
    """
    wheels = [str(wheel) for wheel in sorted(vendor.glob("*.whl"))]
    before = tempfile.tempdir
    tempfile.tempdir = environ.get("RUNNER_TEMP") or before
    sys.path[:0] = wheels
    importlib.invalidate_caches()
    try:
        yield
    finally:
        tempfile.tempdir = before
        for wheel in wheels:
            sys.path.remove(wheel)


def answers(environ: Mapping[str, str]) -> bool:
    """Whether an engine answers, without the SDK. An installed client is no proof: images ship it without a daemon.

    An address that is not a socket file was set on purpose, and counts as an answer.
    """
    address = find_address(environ)
    return address is not None and not unreachable(address)


def connect(environ: Mapping[str, str]) -> Any:
    """Connect to the engine and return a client. Raises `LauncherError`."""
    docker = _sdk()
    address = find_address(environ)
    if not address:
        raise LauncherError(
            "no container engine was found: DOCKER_HOST is not set, and there is no socket of Docker or podman",
            hint="start Docker (or `podman system service`), or run without a container (`runtime: native`)",
        )
    if address.url.startswith("ssh://"):
        raise LauncherError(
            f"{address.origin} names the engine at {address.url}, expected unix:// or tcp://: an engine on another "
            "machine cannot see the workspace",
            hint="run the job on the machine of the engine",
        )
    problem = unreachable(address)
    try:
        if not problem:
            return _client(docker, address)
    except Exception as error:  # noqa: BLE001 # the SDK lets errors of requests, urllib3, ssl and the OS through
        problem = reason(error)
    raise LauncherError(
        f"the container engine at {address.url} ({address.origin}) does not answer: {problem}",
        hint="start it, check that this user may use its socket, or set DOCKER_HOST to another engine",
    )


def _sdk() -> Any:
    try:
        import docker  # noqa: PLC0415 # an optional dependency

        version = str(docker.__version__)
    except (ImportError, AttributeError) as error:
        raise LauncherError(
            f"the Docker SDK for Python is not installed ({error})", hint=f"pip install '{_NEEDED}'"
        ) from error
    if int(re.match(r"\d*", version)[0] or 0) < _OLDEST_SDK:  # type: ignore[index] # `*` always matches
        raise LauncherError(
            f"the Docker SDK for Python has version {version}, expected {_OLDEST_SDK} or newer",
            hint=f"pip install --upgrade '{_NEEDED}'",
        )
    return docker


def _client(docker: Any, address: Address) -> Any:
    """Create a client, which asks the engine for its version.

    Variables that name certificate authorities and proxies are hidden: requests prefers them to the session's settings.
    """
    with _without(os.environ, "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        tls = docker.tls.TLSConfig(**address.tls) if address.tls else False
        client = docker.DockerClient(base_url=address.url, tls=tls, timeout=_ASK_S)
    client.api.trust_env = False
    return client


@contextlib.contextmanager
def _without(environ: MutableMapping[str, str], *names: str) -> Iterator[None]:
    removed_variables = {name: environ.pop(name) for name in names if name in environ}
    try:
        yield
    finally:
        environ.update(removed_variables)


def describe(client: Any) -> Engine:
    """Ask the engine for its facts."""
    with translated("the container engine did not describe itself"):
        version, info = client.version(), client.info()
        components = " ".join(str(part.get("Name")) for part in version.get("Components") or ())
        security = " ".join(str(option) for option in info.get("SecurityOptions") or ())
        devices = " ".join(str(device.get("ID")) for device in info.get("DiscoveredDevices") or ())
        return Engine(
            podman="podman" in components.lower(),
            rootless="rootless" in security,
            remapped="name=userns" in security,
            selinux="selinux" in security,
            nvidia_runtime="nvidia" in (info.get("Runtimes") or {}),
            cdi_gpus="nvidia.com/gpu=" in devices,
        )


# --- images --------------------------------------------------------------------------------------------------------


def ensure_image(client: Any, image: str, log: Callable[[bytes], None], pull: str = "missing") -> str:
    """Pull `image` if necessary, and return its digest in a registry, or else the engine's id of it.

    `pull` is `missing`, `always` or `never`. Raises `LauncherError`.
    """
    existing = None if pull == "always" else _identity(client, image)
    if existing:
        return existing
    hint = (
        "check the name and the digest, log in to its registry (docker/login-action), or build it from the "
        "Dockerfile; the images of old releases are never deleted"
    )
    if pull == "never":
        raise LauncherError(f"the image {image} does not exist here, and `pull` is never", hint=hint)
    log(f"pulling {image}\n".encode())
    with translated(f"the image {image} does not exist here and cannot be pulled", hint=hint):
        for line in progress(client.api.pull(image, stream=True, decode=True)):
            log(line.encode())
        pulled = _identity(client, image)
        if not pulled:
            raise LauncherError("the engine reported a successful pull, but does not have the image")
        return pulled


def _identity(client: Any, image: str) -> str:
    import docker  # noqa: PLC0415

    with translated(f"the engine cannot look up the image {image}"):
        try:
            described = client.api.inspect_image(image)
        except docker.errors.ImageNotFound:
            return ""
        name, digest = docker.utils.parse_repository_tag(image)
        digests = [str(reference) for reference in described.get("RepoDigests") or ()]
        exact = [reference for reference in digests if reference == f"{name}@{digest}"]
        same_name = [reference for reference in digests if reference.startswith(f"{name}@")]
        return (exact or same_name or [str(described["Id"])])[0]


def progress(events: Iterator[dict[str, Any]]) -> Iterator[str]:
    """Turn the engine's events into a line every few seconds. Raises `LauncherError` for an error among them."""
    layers: dict[str, tuple[int, int]] = {}
    due = time.monotonic() + PROGRESS_S
    for event in events:
        if event.get("error"):
            raise LauncherError(str(event["error"]))
        detail = event.get("progressDetail") or {}
        if event.get("status") == "Downloading" and detail.get("total"):
            layers[str(event.get("id"))] = (int(detail.get("current") or 0), int(detail["total"]))
        if layers and time.monotonic() >= due:
            due = time.monotonic() + PROGRESS_S
            done, total = (sum(part[index] for part in layers.values()) / 1e6 for index in (0, 1))
            yield f"pulling: {done:.0f} of {total:.0f} MB\n"


# --- containers ----------------------------------------------------------------------------------------------------


def labelled(client: Any, labels: Mapping[str, str]) -> list[tuple[str, dict[str, str]]]:
    """Return id and labels of every container, running or not, that has these `labels`."""
    filters = [f"{name}={value}" for name, value in labels.items()]
    with translated("the engine cannot list its containers"):
        listed = _listed(client, filters)
        return [(str(container["Id"]), dict(container.get("Labels") or {})) for container in listed]


def _listed(client: Any, labels: list[str]) -> Any:
    """List containers, with retries: podman fails if a container disappears during the listing."""
    import docker  # noqa: PLC0415

    for _ in range(_LIST_ATTEMPTS - 1):
        with contextlib.suppress(docker.errors.APIError):
            return client.api.containers(all=True, filters={"label": labels})
        time.sleep(_LIST_PAUSE_S)
    return client.api.containers(all=True, filters={"label": labels})


def removed(client: Any, name: str) -> bool:
    """Remove a container and its volumes; return whether it existed. Raises `LauncherError`."""
    import docker  # noqa: PLC0415

    with translated("the container cannot be removed"):
        try:
            client.api.remove_container(name, force=True, v=True)
        except docker.errors.NotFound:
            return False
        return True


@contextlib.contextmanager
def standard_input(container: Any, line: bytes) -> Iterator[None]:
    """Attach to a container before its start. After the block, which starts it, write `line` and close."""
    if not line:
        yield
        return
    with translated("the token cannot be passed to the container"):
        attached = container.attach_socket(params={"stdin": 1, "stream": 1})
    # With TLS this is the socket. With a socket file it is a read-only file object around the socket. The SDK keeps a
    # reference to the response in either.
    connection, response = getattr(attached, "_sock", attached), getattr(attached, "_response", attached)
    with contextlib.closing(connection), contextlib.closing(attached), contextlib.closing(response):
        yield
        with translated("the token cannot be passed to the container"):
            connection.sendall(line)


def pass_on_output(container: Any, log: Callable[[bytes], None]) -> None:
    """Pass all output of a container to `log` until the container ends.

    It also ends if the engine goes away, which the caller notices when it waits for the container.
    """
    import docker  # noqa: PLC0415

    with contextlib.suppress(docker.errors.DockerException, OSError):
        for chunk in container.logs(stream=True, follow=True):
            log(chunk)


# --- errors --------------------------------------------------------------------------------------------------------


_UNEXPECTED_ANSWERS = (ValueError, LookupError, TypeError, AttributeError)


@contextlib.contextmanager
def translated(what: str, *, hint: str = "", gpus: str = "") -> Iterator[None]:
    """Turn every exception of the SDK into a `LauncherError` that begins with `what`.

    This includes exceptions of Python about unexpected JSON. If `gpus` were requested, an engine refuses them with
    many different messages, and this adds the remedy.
    """
    import docker  # noqa: PLC0415
    import requests  # noqa: PLC0415

    try:
        yield
    except _UNEXPECTED_ANSWERS as error:
        raise LauncherError(f"{what}: unexpected answer ({type(error).__name__}: {reason(error)})") from error
    except (docker.errors.DockerException, requests.RequestException, OSError, LauncherError) as error:
        words = reason(error)
        if gpus and re.search(r"device driver|cdi|nvidia|gpu", words, re.IGNORECASE):
            what, hint = f"the engine cannot give the container the requested GPUs ({gpus})", GPU_HINT
        elif re.search(r"exec format error|no matching manifest|does not match the .*platform", words, re.IGNORECASE):
            hint = PLATFORM_HINT
        elif re.search(r"no such file or directory|source path does not exist", words, re.IGNORECASE):
            hint = hint or MOUNT_HINT
        raise LauncherError(f"{what}: {words}", hint=hint) from error


PLATFORM_HINT = (
    "the released images are for amd64: use an amd64 runner, or build the image from the Dockerfile on this runner and "
    "name it in `image`"
)
MOUNT_HINT = (
    "the engine mounts directories of its own host, so this happens if the runner or the job is itself a container: "
    "run the job in merge-gate's image (`container:`) with `runtime: native`"
)


def reason(error: Exception) -> str:
    """The engine's own message on one line, without the text that the SDK adds."""
    if isinstance(error, GateError):
        return error.message
    text = str(getattr(error, "explanation", None) or error)
    return " ".join(text.split())[:_REASON_LENGTH]
