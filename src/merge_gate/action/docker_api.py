"""The container engine, Docker or podman, its images and its errors; the Docker SDK is imported here only.

In: the caller's environment, a name of an image. Out: a client that has answered, what the engine says of itself, an
image that is there. Whatever the SDK raises becomes a `LauncherError` with a sentence. Keeps to Python 3.9.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate.errors import GateError, LauncherError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_ASK_S = 30
_PING_S = 5
_PROGRESS_S = 5.0
_REASON_LIMIT = 400
_SOCKETS = (
    "/var/run/docker.sock", "{home}/.docker/run/docker.sock", "{runtime}/docker.sock",
    "/run/podman/podman.sock", "{runtime}/podman/podman.sock",
)  # fmt: skip


@dataclass(frozen=True)
class Engine:
    """What an engine says of itself, as far as it matters here."""

    podman: bool
    rootless: bool
    selinux: bool
    nvidia_runtime: bool
    cdi_gpus: bool


# --- the engine ----------------------------------------------------------------------------------------------------


def find_address(environ: Mapping[str, str]) -> str:
    """Return the address of the engine: DOCKER_HOST, else the first known socket that exists, else an empty string."""
    if environ.get("DOCKER_HOST"):
        return environ["DOCKER_HOST"]
    places = {
        "home": environ.get("HOME") or str(Path.home()),
        "runtime": environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}",
    }
    paths = [Path(template.format(**places)) for template in _SOCKETS]
    return next((f"unix://{path}" for path in paths if _is_socket(path)), "")


def _is_socket(path: Path) -> bool:
    try:
        return path.is_socket()
    except OSError:  # another user's directory
        return False


def answers(environ: Mapping[str, str]) -> bool:
    """Tell whether an engine answers, without the SDK. A client alone proves nothing: images ship it without a daemon.

    An address other than a socket file was set on purpose, and is taken at its word.
    """
    address = find_address(environ)
    return bool(address) and not _silence(address)


def _silence(address: str) -> str:
    """Say why nobody answers at a socket file, an empty string where somebody does or it is another kind of address."""
    if not address.startswith("unix://"):
        return ""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_PING_S)
            connection.connect(address[len("unix://") :])
            connection.sendall(b"GET /_ping HTTP/1.0\r\nHost: engine\r\n\r\n")
            return "" if b" 200 " in connection.recv(64) else "it is no container engine"
    except OSError as error:
        return error.strerror or str(error)


def connect(environ: Mapping[str, str]) -> Any:
    """Return a client of the engine that has answered. Raises `LauncherError`."""
    try:
        import docker  # noqa: PLC0415 # an optional dependency
    except ImportError as error:
        raise LauncherError(
            f"the Docker SDK for Python is not there ({error})", hint="pip install 'merge-gate[launcher]'"
        ) from error
    address = find_address(environ)
    if not address:
        raise LauncherError(
            "no container engine was found: DOCKER_HOST is not set and no socket of Docker or podman is there",
            hint="start Docker (or `podman system service`), or run without a container (`runtime: native`)",
        )
    trouble = _silence(address)
    try:
        if not trouble:
            return docker.DockerClient(base_url=address, timeout=_ASK_S)  # which asks the engine for its version
    except Exception as error:  # noqa: BLE001 # the SDK lets errors of requests, urllib3, paramiko and the OS through
        trouble = reason(error)
    raise LauncherError(
        f"the container engine at {address} does not answer: {trouble}",
        hint="start it, check that this user may use its socket, or set DOCKER_HOST to another one",
    )


def describe(client: Any) -> Engine:
    """Ask the engine what it is."""
    with translated("the container engine cannot describe itself"):
        version, info = client.version(), client.info()
    components = " ".join(str(part.get("Name")) for part in version.get("Components") or ())
    security = " ".join(str(option) for option in info.get("SecurityOptions") or ())
    devices = " ".join(str(device.get("ID")) for device in info.get("DiscoveredDevices") or ())
    return Engine(
        podman="podman" in components.lower(),
        rootless="rootless" in security,
        selinux="selinux" in security,
        nvidia_runtime="nvidia" in (info.get("Runtimes") or {}),
        cdi_gpus="nvidia.com/gpu=" in devices,
    )


# --- images --------------------------------------------------------------------------------------------------------


def ensure_image(client: Any, image: str, log: Callable[[bytes], None]) -> None:
    """Pull `image` unless the engine has it. Raises `LauncherError`."""
    import docker  # noqa: PLC0415

    with translated(f"the engine cannot look up the image {image}"):
        try:
            client.images.get(image)
        except docker.errors.ImageNotFound:
            pass
        else:
            return
    log(f"pulling {image}\n".encode())
    hint = (
        "check the name and the digest, log in to its registry (docker/login-action), or build it from the "
        "Dockerfile; the images of old releases are never deleted"
    )
    with translated(f"the image {image} is not there and cannot be pulled", hint=hint):
        name, tag = name_and_tag(image)
        for line in progress(client.api.pull(name, tag=tag, stream=True, decode=True)):
            log(line.encode())
        client.images.get(image)


def name_and_tag(image: str) -> tuple[str, str]:
    """`host:5000/name@sha256:…` → name and digest; `host:5000/name:tag` → name and tag."""
    name, at, digest = image.partition("@")
    if at:
        return name, digest
    head, colon, tag = image.rpartition(":")
    return (head, tag) if colon and "/" not in tag else (image, "latest")


def progress(events: Iterator[dict[str, Any]]) -> Iterator[str]:
    """Turn the engine's events into a line every few seconds. Raises `LauncherError` for an error among them."""
    layers: dict[str, tuple[int, int]] = {}
    due = time.monotonic() + _PROGRESS_S
    for event in events:
        if event.get("error"):
            raise LauncherError(str(event["error"]))
        detail = event.get("progressDetail") or {}
        if event.get("status") == "Downloading" and detail.get("total"):
            layers[str(event.get("id"))] = (int(detail.get("current") or 0), int(detail["total"]))
        if layers and time.monotonic() >= due:
            due = time.monotonic() + _PROGRESS_S
            done, total = (sum(part[index] for part in layers.values()) / 1e6 for index in (0, 1))
            yield f"pulling: {done:.0f} of {total:.0f} MB\n"


# --- containers ----------------------------------------------------------------------------------------------------


def pass_on_output(container: Any, log: Callable[[bytes], None]) -> None:
    """Give `log` the output of a container from its first word until it ends.

    Where the engine goes away this ends too; whoever waits for the container tells of it.
    """
    import docker  # noqa: PLC0415

    with contextlib.suppress(docker.errors.DockerException, OSError):
        for chunk in container.logs(stream=True, follow=True):
            log(chunk)


# --- errors --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def translated(what: str, *, hint: str = "", gpus: str = "") -> Iterator[None]:
    """Turn whatever the SDK raises into a `LauncherError` that begins with `what`.

    `gpus` are those asked for: an engine that refuses them says so in many ways, none of which names the remedy.
    """
    import docker  # noqa: PLC0415
    import requests  # noqa: PLC0415

    try:
        yield
    except (docker.errors.DockerException, requests.RequestException, LauncherError) as error:
        words = reason(error)
        if gpus and re.search(r"device driver|cdi|nvidia|gpu", words, re.IGNORECASE):
            what, hint = f"the engine cannot give the container the GPUs asked for ({gpus})", GPU_HINT
        elif re.search(r"no such file or directory|source path does not exist", words, re.IGNORECASE):
            hint = hint or MOUNT_HINT
        raise LauncherError(f"{what}: {words}", hint=hint) from error


GPU_HINT = (
    "install the NVIDIA Container Toolkit on the runner (and its CDI specification for podman), or set `gpus: none` "
    "to run on the CPU"
)
MOUNT_HINT = (
    "the engine mounts directories of its own host, so this happens where the runner or the job is itself a "
    "container: run the job in merge-gate's image (`container:`) with `runtime: native`"
)


def reason(error: Exception) -> str:
    """The engine's own words on one line, without the SDK's wrapping."""
    if isinstance(error, GateError):
        return error.message
    text = str(getattr(error, "explanation", None) or error)
    return " ".join(text.split())[:_REASON_LIMIT]
