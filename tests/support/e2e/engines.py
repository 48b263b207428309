"""Container engines as the end-to-end tests need them: started, asked, and used by another user."""

import contextlib
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import docker

from merge_gate.action.docker import docker_api
from merge_gate.action.docker.docker_api import Address, unreachable
from merge_gate.action.docker.leftovers import LABEL

PATIENCE_S = 120
"""How long something that has to happen may take on a busy machine; what never happens is found out after it."""
BASE_IMAGE = "localhost/merge-gate-base:trixie"
"""Debian with Python 3.11, as .ci/install-e2e.sh makes it."""


@contextlib.contextmanager
def serving(podman_environment: dict[str, str], socket: Path, *before: str) -> Iterator[subprocess.Popen]:
    """podman's Docker-compatible API at `socket`; `before` is a command that starts it."""
    words = [*before, "podman", "system", "service", "--time=0", f"unix://{socket}"]
    with answering(words, podman_environment, socket) as service:
        yield service


@contextlib.contextmanager
def answering(words: list[str], environ: dict[str, str], socket: Path) -> Iterator[subprocess.Popen]:
    """A program that serves an engine's API at `socket`, once it answers."""
    service = subprocess.Popen(words, env=environ, cwd="/")  # another user may not enter this directory
    try:
        end = time.monotonic() + PATIENCE_S
        while unreachable(Address(f"unix://{socket}", "the tests")):
            assert service.poll() is None, f"{words} ended"
            assert time.monotonic() < end, f"{words} does not answer"
            time.sleep(0.1)
        yield service
    finally:
        service.terminate()
        service.wait(PATIENCE_S)


def as_user(uid: int, function) -> int:
    """Call `function` in a child that has become `uid`, and return the exit code that it returned."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            code = function()
        except Exception:  # noqa: BLE001 # whatever it is, the child ends here
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def described(engine: str, place: Path) -> list[dict]:
    """What the engine tells of each container of merge-gate that mounts something at or below `place`.

    Others are none of the tests' business, and may go away while one looks.
    """
    with contextlib.closing(docker.DockerClient(base_url=engine)) as client:
        known = []
        for container, _labels in docker_api.labelled(client, LABEL):
            try:
                known.append(client.api.inspect_container(container))
            except docker.errors.APIError as error:
                if "no such container" not in str(error):
                    raise
        return [one for one in known if any(_lies_at(mount, place) for mount in one["Mounts"])]


def _lies_at(mount: dict, place: Path) -> bool:
    ends = (Path(mount["Source"]), Path(mount["Destination"]))
    return any(place == end or place in end.parents for end in ends)


def pip_settings(*more: str) -> dict[str, str]:
    """The settings of pip on this machine that pip in a container needs too; `more` names further ones."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    kept = ("index-url", "extra-index-url", "find-links", "trusted-host", "cert", "timeout", "default-timeout", "proxy")
    pairs = (line.partition("=") for line in listed.splitlines() if "=" in line)
    named = {key.rpartition(".")[2]: value.strip("'\"") for key, _, value in pairs}
    return {key: value for key, value in named.items() if key in {*kept, *more}}
