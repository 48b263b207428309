"""Connects to a Ray cluster, or starts one on this machine for a single run. The only module that imports Ray.

An address goes in; a `Cluster` with its nodes comes out, or a `GateError`. Ray is imported only when a cluster is
requested. No dashboard is started, and no statistics are sent.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from merge_gate.errors import GateError
from merge_gate.on_ray.ray_task import RayPart, run_part
from merge_gate.records.terms import record
from merge_gate.worker.protocol import Event

LOCAL = ""
"""The address of a new cluster on this machine, for this run."""

OBJECT_STORE_BYTES = 80 << 20
"""The object store of a local cluster: slightly above Ray's minimum. It holds only events."""

_ADDRESS = re.compile(r"auto|[A-Za-z0-9._-]+:\d{1,5}|\[[0-9A-Fa-f:]+\]:\d{1,5}")
_HINT = "start the cluster, or correct ADDRESS; the gate must be able to reach the head node"
_CONNECT_S = 5.0
_HEALTH_S = 45.0


@record
class Resources:
    """The resources of a node, or of a task and the node that it should run on while that node is up.

    `node` is the id of the node.
    """

    node: str
    cpus: int
    gpus: int
    memory_bytes: int


class LostError(Exception):
    """A task, its worker, its node, or its result is lost."""


class Cluster:
    """A connected cluster."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415

        self._affinity = NodeAffinitySchedulingStrategy

    def nodes(self) -> tuple[Resources, ...]:
        """The nodes that are up and have a CPU, in the order of their ids."""
        nodes = []
        for node in self._ray.nodes():
            resources = node["Resources"]
            if node["Alive"] and resources.get("CPU", 0) >= 1:
                cpus, gpus, memory = (int(resources.get(name, 0)) for name in ("CPU", "GPU", "memory"))
                nodes.append(Resources(node=node["NodeID"], cpus=cpus, gpus=gpus, memory_bytes=memory))
        return tuple(sorted(nodes, key=lambda node: node.node))

    def submit(self, part: RayPart, needs: Resources) -> Any:
        """Start a part, and return its handle for `ready`, `events` and `cancel`."""
        remote = self._ray.remote(run_part).options(
            num_returns="streaming",
            max_retries=0,  # the run restarts a lost part itself, without the adapters that have a verdict
            num_cpus=needs.cpus,
            memory=needs.memory_bytes,
            scheduling_strategy=self._affinity(needs.node, soft=True),
            **({"num_gpus": needs.gpus} if needs.gpus else {}),
        )
        return remote.remote(part)

    def ready(self, running: list[Any], patience_s: float) -> list[Any]:
        """The handles that have an event, or whose task has ended or is lost."""
        return list(self._ray.wait(running, timeout=patience_s, num_returns=1)[0])

    def events(self, running: Any) -> list[Event] | None:
        """The next events; None at the end.

        Raises:
            LostError: the task is lost.
        """
        try:
            events: list[Event] = self._ray.get(next(running))
        except StopIteration:
            return None
        except self._ray.exceptions.RayError as error:
            line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
            raise LostError(f"{type(error).__name__}: {line[:300]}") from error
        return events

    def cancel(self, running: Any) -> None:
        with contextlib.suppress(Exception):  # the task or the cluster is gone
            self._ray.cancel(running, force=True)


def checked_address(address: str) -> str:
    """Return the address if it is valid.

    Raises:
        GateError: it is not an address.
    """
    if address != LOCAL and not _ADDRESS.fullmatch(address):
        raise GateError(
            f"--ray {address!r} is not the address of a Ray cluster, expected HOST:PORT or auto",
            hint="put --ray ADDRESS after all other arguments; for a cluster on this machine, end with --ray alone",
        )
    return address


@contextlib.contextmanager
def cluster(address: str, *, object_store_bytes: int = OBJECT_STORE_BYTES) -> Iterator[Cluster]:
    """Connect, and disconnect at the end without leaving anything behind.

    Raises:
        GateError: Ray is not installed, or there is no such cluster (raised within a minute).
    """
    os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"})
    if address not in {LOCAL, "auto"}:
        _reach(address)
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {"address": address}
        if address == LOCAL:
            os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})
            place = tempfile.mkdtemp(prefix="mg-ray-", dir="/tmp")
            stack.callback(shutil.rmtree, place, ignore_errors=True)
            options = {
                "address": "local",
                "_temp_dir": place,
                "include_dashboard": False,
                "object_store_memory": object_store_bytes,
            }
        ray = _imported()
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        stack.callback(ray.shutdown)
        _init(ray, address, options)
        yield Cluster(ray)


def _imported() -> Any:
    try:
        import ray  # noqa: PLC0415 - only here
    except ImportError as error:
        raise GateError(f"--ray: Ray is not installed ({error})", hint="pip install 'ray>=2.60'") from error
    return ray


def _init(ray: Any, address: str, options: dict[str, Any]) -> None:
    """Start or connect to Ray, and restore the run's own signal handlers, which Ray replaces."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ray.init(log_to_driver=False, logging_level="CRITICAL", configure_logging=False, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        started = "a Ray cluster cannot be started on this machine"
        problem = started if address == LOCAL else f"no Ray cluster at {address}"
        hint = "free memory and disk space, or give the address of a running cluster" if address == LOCAL else _HINT
        raise GateError(f"{problem}: {line[:300]}", hint=hint) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _reach(address: str) -> None:
    """Check that a cluster answers. Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise GateError(f"no Ray cluster at {address}: {error}", hint=_HINT) from error
    _imported()
    words = [sys.executable, "-P", "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        done = subprocess.run(words, check=False, stdin=subprocess.DEVNULL, capture_output=True, timeout=_HEALTH_S)
    except subprocess.TimeoutExpired as error:
        raise GateError(f"the service at {address} did not answer as a Ray cluster", hint=_HINT) from error
    if done.returncode:
        raise GateError(f"the service at {address} is not a healthy Ray cluster", hint=_HINT)
