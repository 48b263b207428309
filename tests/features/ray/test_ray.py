"""A fleet on Ray: the report of one machine, whatever dies meanwhile; and a sentence where there is no cluster.

The clusters are real, of two workers on this machine. tests/features/ray/test_run_on_ray.py has the rest without one.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command import COMMAND, PATIENCE_S, environment, merge_gate, wait_until
from tests.support.fleet_commands import stored
from tests.support.small_fleet import same

NO_AUTH = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


@contextlib.contextmanager
def running(place: Path, *words: str, **changes: str) -> Iterator[subprocess.Popen[bytes]]:
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(
            [*COMMAND, "run", "fleet.yml", *words],
            cwd=place, env=environment(**changes), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def judged(place: Path) -> int:
    return (place / "log").read_text(encoding="utf-8", errors="replace").count("] ")


def tasks_of(marker: str) -> list[int]:
    """The processes of Ray that work on a part of the run with this in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            is_task = entry.name.isdecimal() and (entry / "cmdline").read_bytes().startswith(b"ray::run_shard")
            if is_task and f"MARKER={marker}\0".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


@pytest.mark.nightly
def test_a_worker_that_is_killed_costs_a_retry_and_no_verdict(fleet: Path) -> None:
    """All that work are killed, in the middle of their shards."""
    marker = str(fleet)
    with running(fleet, "--output", "killed", "--ray", MARKER=marker) as process:
        wait_until(lambda: judged(fleet) > 0, process)
        tasks = tasks_of(marker)
        assert tasks
        for task in tasks:
            os.kill(task, signal.SIGKILL)
        assert process.wait(PATIENCE_S) == 1, (fleet / "log").read_text()
    assert same(stored(fleet / "killed")) == same(stored(fleet / "cold"))
    assert tasks_of(marker) == []


@pytest.mark.nightly
def test_a_signal_ends_all_tasks_and_leaves_a_true_report(fleet: Path) -> None:
    marker = f"{fleet}/stopped"
    with running(fleet, "--output", "stopped", "--ray", MARKER=marker) as process:
        wait_until(lambda: judged(fleet) > 4, process)
        process.terminate()
        assert process.wait(PATIENCE_S) == 3, (fleet / "log").read_text()
    wait_until(lambda: not tasks_of(marker))
    assert "SIGTERM" in (fleet / "log").read_text(encoding="utf-8")
    assert not stored(fleet / "stopped").complete
    assert stored(fleet / "stopped").adapters


@pytest.mark.nightly
def test_models_are_published_and_verdicts_are_cached(fleet: Path) -> None:
    """The models have the bytes that one machine publishes."""
    only = ("--only", "plain-0", "--only", "rslora-1", "--only", "float16-base-0")
    for directory, more in (("by-one", ()), ("by-ray", ("--cache", "ray-cache", "--ray"))):
        words = ("run", "fleet.yml", *only, "--output", f"{directory}-report", "--publish", directory, *more)
        assert merge_gate(*words, cwd=fleet).code == 1
    by_one, by_ray = (
        {path.relative_to(fleet / directory): path.read_bytes() for path in (fleet / directory).rglob("*.safetensors")}
        for directory in ("by-one", "by-ray")
    )
    assert by_ray == by_one
    assert {path.parts[0] for path in by_ray} == {"plain-0", "rslora-1"}
    assert {one.published.directory for one in stored(fleet / "by-ray-report").adapters if one.published} == {
        "by-ray/plain-0",
        "by-ray/rslora-1",
    }
    merge_gate("run", "fleet.yml", *only, "--output", "again", "--cache", "ray-cache", "--device", "cpu", cwd=fleet)
    assert {one.name for one in stored(fleet / "again").adapters if one.cached} == {"plain-0", "rslora-1"}


CLUSTER = """
import sys
from ray.cluster_utils import Cluster
small = {"object_store_memory": 80 << 20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(nodes.pop(), allow_graceful=False)
    print("removed", flush=True)
cluster.shutdown()
"""


@pytest.mark.nightly
def test_a_node_that_is_removed_costs_a_retry_and_no_verdict(fleet: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", CLUSTER], env=environment(**NO_AUTH), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert owner.stdin is not None
    assert owner.stdout is not None
    try:
        address = owner.stdout.readline().strip()
        with running(fleet, "--output", "removed", "--ray", address, **NO_AUTH) as process:
            wait_until(lambda: judged(fleet) > 4, process)
            owner.stdin.write("remove\n")
            owner.stdin.flush()
            assert owner.stdout.readline() == "removed\n"
            assert process.wait(PATIENCE_S) == 1, (fleet / "log").read_text()
    finally:
        owner.communicate(timeout=PATIENCE_S)
    assert same(stored(fleet / "removed")) == same(stored(fleet / "cold"))


@pytest.mark.nightly
def test_a_cluster_that_is_not_there_is_said_within_a_minute(fleet: Path) -> None:
    with contextlib.closing(socket.socket()) as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        began = time.monotonic()
        answer = merge_gate("run", "fleet.yml", "--output", "none", "--ray", f"127.0.0.1:{port}", cwd=fleet)
        assert (answer.code, f"127.0.0.1:{port}" in answer.err) == (3, True), answer.said
        listening.listen()
        answer = merge_gate("run", "fleet.yml", "--output", "none", "--ray", f"127.0.0.1:{port}", cwd=fleet)
        assert (answer.code, f"127.0.0.1:{port}" in answer.err) == (3, True), answer.said
        assert time.monotonic() - began < 2 * 60
    assert not stored(fleet / "none").complete


@pytest.mark.slow
def test_an_object_store_that_is_too_small_is_said(tmp_path: Path) -> None:
    script = (
        "from merge_gate.features.ray.feature import LOCAL, cluster\n"
        "with cluster(LOCAL, object_store_bytes=1 << 20): pass"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment(), check=False, capture_output=True, text=True
    )
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert "GateError: " in said
    assert "object store memory" in said


def test_nothing_of_ray_is_imported_without_the_option() -> None:
    script = "import sys, merge_gate.cli.dispatch, merge_gate.features.ray.feature; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"
