"""A Ray cluster: one on this machine for this run alone, or one that is there. The only user of Ray.

In: an address. Out: `Cluster`, its nodes, and tasks on it. Raises `GateError` where there is none. Nothing of Ray is
imported before a cluster is asked for; no dashboard is started, and no statistics are sent.
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
"""The address that stands for a cluster on this machine, for this run."""

OBJECT_STORE_BYTES = 80 << 20
"""Of a local cluster: a little above the least that Ray takes. Events are its only content."""

_ADDRESS = re.compile(r"auto|[A-Za-z0-9._-]+:\d{1,5}|\[[0-9A-Fa-f:]+\]:\d{1,5}")
_HINT = "start it, or correct ADDRESS; the gate must be able to reach the head node"
_CONNECT_S = 5.0
_HEALTH_S = 45.0


@record
class Resources:
    """What a node of the cluster has, or what a task needs of it. `node` is the id of the node."""

    node: str
    cpus: int
    gpus: int
    memory_bytes: int


class LostError(Exception):
    """A task, its worker or its node is gone, or what it said is."""


class Cluster:
    """A connected cluster."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415

        self._affinity = NodeAffinitySchedulingStrategy

    def nodes(self) -> tuple[Resources, ...]:
        """The nodes that can do something, in the order of their ids."""
        known = []
        for one in self._ray.nodes():
            has = one["Resources"]
            if one["Alive"] and has.get("CPU", 0) >= 1:
                cpus, gpus, memory = (int(has.get(name, 0)) for name in ("CPU", "GPU", "memory"))
                known.append(Resources(node=one["NodeID"], cpus=cpus, gpus=gpus, memory_bytes=memory))
        return tuple(sorted(known, key=lambda resources: resources.node))

    def submit(self, part: RayPart, needs: Resources) -> Any:
        """Begin a part; what is returned is for `ready`, `events` and `cancel`."""
        remote = self._ray.remote(run_part).options(
            num_returns="streaming",
            max_retries=0,  # what was judged already is not judged again: the run knows what is left
            num_cpus=needs.cpus,
            memory=needs.memory_bytes,
            scheduling_strategy=self._affinity(needs.node, soft=True),
            **({"num_gpus": needs.gpus} if needs.gpus else {}),
        )
        return remote.remote(part)

    def ready(self, running: list[Any], patience_s: float) -> list[Any]:
        """Those of which something can be heard, or that are gone."""
        return list(self._ray.wait(running, timeout=patience_s, num_returns=1)[0])

    def events(self, running: Any) -> list[Event] | None:
        """The next events; None at the end.

        Raises:
            LostError: it will say nothing more.
        """
        try:
            said: list[Event] = self._ray.get(next(running))
        except StopIteration:
            return None
        except self._ray.exceptions.RayError as error:
            line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
            raise LostError(f"{type(error).__name__}: {line[:300]}") from error
        return said

    def cancel(self, running: Any) -> None:
        with contextlib.suppress(Exception):  # it is gone, or the cluster is
            self._ray.cancel(running, force=True)


def checked_address(address: str) -> str:
    """An address as it can be used.

    Raises:
        GateError: it is none.
    """
    if address != LOCAL and not _ADDRESS.fullmatch(address):
        raise GateError(
            f"--ray {address!r}: this is no address of a Ray cluster",
            hint="expected HOST:PORT or auto, after all other words; for a cluster on this machine, --ray at the end",
        )
    return address


@contextlib.contextmanager
def cluster(address: str, *, object_store_bytes: int = OBJECT_STORE_BYTES) -> Iterator[Cluster]:
    """Connect, and leave nothing behind.

    Raises:
        GateError: Ray is not installed, or there is no such cluster; within a minute.
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
        raise GateError(f"--ray: Ray is not there ({error})", hint="pip install 'ray>=2.60'") from error
    return ray


def _init(ray: Any, address: str, options: dict[str, Any]) -> None:
    """Ray takes the handlers of signals for itself; the run's own go on."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ray.init(log_to_driver=False, logging_level="CRITICAL", configure_logging=False, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        what = "a Ray cluster on this machine cannot be started" if address == LOCAL else f"no Ray cluster at {address}"
        hint = "free memory and disk, or name a cluster that runs" if address == LOCAL else _HINT
        raise GateError(f"{what}: {line[:300]}", hint=hint) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _reach(address: str) -> None:
    """Whether a cluster answers; Ray itself would wait for minutes."""
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
        raise GateError(f"what listens at {address} is no Ray cluster that answers", hint=_HINT) from error
    if done.returncode:
        raise GateError(f"what listens at {address} is no healthy Ray cluster", hint=_HINT)
