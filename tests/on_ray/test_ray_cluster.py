"""The door to Ray, with a stand-in for it: what it is asked for, and a sentence for each way in which it refuses.

tests/on_ray/test_ray.py has real clusters.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tomllib
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from ray import exceptions

from merge_gate.errors import GateError
from merge_gate.on_ray import ray_cluster
from merge_gate.on_ray.ray_cluster import LOCAL, Cluster, LostError, Resources, checked_address, cluster
from merge_gate.on_ray.ray_task import RayPart, run_part
from merge_gate.worker.protocol import Idle, Job
from tests.support.wording import Wording

if TYPE_CHECKING:
    from collections.abc import Iterator

HEAD = "head:6379"
ROOT = Path(__file__).parents[2]
PART = RayPart(job=Job(groups=()), bases=(), versions_sha256="0" * 64)
GIB = 1 << 30
NODE = "ab" * 28


class Ray:
    """What the gate uses of Ray."""

    exceptions = exceptions

    def __init__(self, **answers: Any) -> None:
        self.answers, self.asked = answers, dict[str, Any]()
        self.is_up = False

    def init(self, **options: Any) -> None:
        self.asked |= options
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray has its own
        if "refusal" in self.answers:
            raise self.answers["refusal"]
        self.is_up = True

    def shutdown(self) -> None:
        self.is_up = False

    def nodes(self) -> Any:
        return self.answers["nodes"]

    def wait(self, running: list[Any], **how: Any) -> tuple[list[Any], list[Any]]:
        self.asked |= how
        return running[:1], running[1:]

    def get(self, said: Any) -> Any:
        if isinstance(said, Exception):
            raise said
        return said

    def cancel(self, running: Any, **how: Any) -> None:
        self.asked |= {"cancelled": running, **how}
        raise ValueError("it is gone")

    def remote(self, function: Any) -> Any:
        def options(**how: Any) -> Any:
            self.asked |= how
            return SimpleNamespace(remote=lambda part: (function, part))

        return SimpleNamespace(options=options)


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray's variables and the handlers of signals are put back."""
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "")
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


# --- a connected cluster ---------------------------------------------------------------------------------------------


def node(name: str, *, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"NodeID": name, "Alive": alive, "Resources": resources}


def test_nodes_are_those_that_can_do_something_in_the_order_of_their_ids() -> None:
    known = [
        node("c", CPU=8.0, GPU=2.0, memory=4.0 * GIB, **{"node:10.0.0.3": 1.0}),
        node("a", CPU=2.0, memory=1.0 * GIB),
        node("head", memory=1.0 * GIB),
        node("small", CPU=0.5),
        node("b", alive=False, CPU=8.0, memory=1.0 * GIB),
    ]
    assert Cluster(Ray(nodes=known)).nodes() == (
        Resources(node="a", cpus=2, gpus=0, memory_bytes=GIB),
        Resources(node="c", cpus=8, gpus=2, memory_bytes=4 * GIB),
    )


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_part_asks_for_what_it_needs_and_ray_begins_nothing_again(gpus: int) -> None:
    ray = Ray()
    began = Cluster(ray).submit(PART, Resources(node=NODE, cpus=4, gpus=gpus, memory_bytes=GIB))
    assert began == (run_part, PART)
    where = ray.asked.pop("scheduling_strategy")
    assert (where.node_id, where.soft) == (NODE, True)
    assert ray.asked == {
        "num_returns": "streaming",
        "max_retries": 0,
        "num_cpus": 4,
        "memory": GIB,
        **({"num_gpus": 1} if gpus else {}),
    }


def test_whoever_is_ready_is_heard_first() -> None:
    ray = Ray()
    assert Cluster(ray).ready(["x", "y"], 0.5) == ["x"]
    assert ray.asked == {"timeout": 0.5, "num_returns": 1}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (exceptions.RayError("\n  the node died\nstack"), "RayError: the node died"),
        (exceptions.RayError(" \n"), "RayError: no message"),
        (exceptions.RayError("x" * 999), "RayError: " + "x" * 300),
    ],
)
def test_what_is_lost_says_why_in_a_line(error: Exception, said: str) -> None:
    here = Cluster(Ray())
    running = iter([[Idle()], error])
    assert here.events(running) == [Idle()]
    with pytest.raises(LostError) as caught:
        here.events(running)
    assert str(caught.value) == said
    assert here.events(running) is None


def test_what_is_gone_can_be_cancelled() -> None:
    ray = Ray()
    Cluster(ray).cancel("x")
    assert ray.asked == {"cancelled": "x", "force": True}


# --- how it is reached -----------------------------------------------------------------------------------------------


def test_a_cluster_of_this_machine_is_for_this_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray()
    monkeypatch.setattr(ray_cluster, "_imported", lambda: ray)
    handler = signal.getsignal(signal.SIGTERM)
    with cluster(LOCAL, object_store_bytes=7):
        place = Path(ray.asked["_temp_dir"])
        assert ray.is_up
        assert place.is_dir()
        assert ray.asked["address"] == "local"
        assert (ray.asked["include_dashboard"], ray.asked["object_store_memory"]) == (False, 7)
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        assert signal.getsignal(signal.SIGTERM) is handler
    assert not ray.is_up
    assert not place.exists()


@pytest.mark.parametrize("address", ["auto", HEAD])
def test_a_cluster_that_is_there_is_only_connected_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ray, reached = Ray(), list[str]()
    monkeypatch.setattr(ray_cluster, "_imported", lambda: ray)
    monkeypatch.setattr(ray_cluster, "_reach", reached.append)
    with cluster(address):
        assert ray.is_up
    assert not ray.is_up
    assert ray.asked["address"] == address
    assert "_temp_dir" not in ray.asked
    assert os.environ["RAY_AUTH_MODE"] == "", "whoever made it decides"
    assert reached == [one for one in (address,) if one != "auto"], "Ray finds its own"


@pytest.mark.parametrize(
    ("address", "refusal"),
    [
        (LOCAL, ValueError("\n too little memory\nmore")),
        (LOCAL, OSError()),
        ("auto", ConnectionError("none found")),
    ],
)
def test_a_cluster_that_cannot_be_is_said(
    address: str, refusal: Exception, wording: Wording, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = Ray(refusal=refusal)
    monkeypatch.setattr(ray_cluster, "_imported", lambda: ray)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(GateError) as caught, cluster(address):
        pytest.fail("there is none")
    wording(caught.value)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not Path(ray.asked.get("_temp_dir", "/nowhere")).exists()


def test_without_ray_what_its_extra_brings_is_named(monkeypatch: pytest.MonkeyPatch, wording: Wording) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(GateError, match="--ray") as caught, cluster(LOCAL):
        pytest.fail("there is none")
    wording(caught.value.message)
    (needed,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["ray"]
    assert caught.value.hint == f"pip install '{needed}'"


@pytest.mark.parametrize("address", ["fleet.yml", "ray://head:10001", "head", "head:port", "-", "local"])
def test_what_is_no_address_is_said(address: str, wording: Wording) -> None:
    with pytest.raises(GateError) as caught:
        checked_address(address)
    wording(caught.value)
    for fine in ("", "auto", "head:6379", "10.0.0.1:6379", "[::1]:6379"):
        assert checked_address(fine) == fine


@pytest.fixture
def listening() -> Iterator[str]:
    """An address at which something listens."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:99999"])
def test_where_nobody_listens_is_no_cluster(address: str, wording: Wording) -> None:
    with pytest.raises(GateError, match=address) as caught:
        ray_cluster._reach(address)
    wording(caught.value)


def test_what_listens_and_says_nothing_is_no_cluster(
    listening: str, monkeypatch: pytest.MonkeyPatch, wording: Wording
) -> None:
    monkeypatch.setattr(ray_cluster, "_HEALTH_S", 0.1)
    with pytest.raises(GateError, match=listening) as caught:
        ray_cluster._reach(listening)
    wording(caught.value)


@pytest.mark.parametrize(("program", "healthy"), [("/bin/true", True), ("/bin/false", False)])
def test_what_ray_says_of_a_clusters_health_decides(
    program: str, healthy: bool, listening: str, monkeypatch: pytest.MonkeyPatch, wording: Wording
) -> None:
    monkeypatch.setattr(sys, "executable", program)
    if healthy:
        ray_cluster._reach(listening)
        return
    with pytest.raises(GateError, match=listening) as caught:
        ray_cluster._reach(listening)
    wording(caught.value)
