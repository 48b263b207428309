"""Connects to a Ray cluster, or starts one on this machine for a single run. The only module that imports Ray.

An address goes in; the module `ray`, connected, comes out, or a `GateError`. Ray is imported only when a cluster is
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

LOCAL = ""
"""The address of a new cluster on this machine, for this run."""

OBJECT_STORE_BYTES = 80 << 20
"""The object store of a local cluster: slightly above Ray's minimum. It holds only what tasks send."""

_ADDRESS = re.compile(r"auto|[A-Za-z0-9._-]+:\d{1,5}|\[[0-9A-Fa-f:]+\]:\d{1,5}")
_HINT = "start the cluster, or correct ADDRESS; the gate must be able to reach the head node"
_CONNECT_S = 5.0
_HEALTH_S = 45.0


def first_line(error: Exception) -> str:
    """The message of one of Ray's errors, which may have many lines."""
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), type(error).__name__)


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
def cluster(address: str, *, object_store_bytes: int = OBJECT_STORE_BYTES) -> Iterator[Any]:
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
        yield ray


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
        problem, hint = f"no Ray cluster at {address}", _HINT
        if address == LOCAL:
            problem = "a Ray cluster cannot be started on this machine"
            hint = "free memory and disk space, or give the address of a running cluster"
        raise GateError(f"{problem}: {first_line(error)}", hint=hint) from error
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
