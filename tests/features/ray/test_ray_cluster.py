"""The door to Ray, with a stand-in for it: what it is asked for, and a sentence for each way in which it refuses.

tests/features/ray/test_ray.py has real clusters.
"""

import argparse
import os
import signal
import socket
import sys
import tomllib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from ray import exceptions

from merge_gate._internal.errors import GateError
from merge_gate.features.ray import feature as run_on_ray
from merge_gate.features.ray.declared import LOCAL, configured
from merge_gate.features.ray.feature import cluster, first_line
from merge_gate.records.config import Config
from tests.support.fake_ray import Ray
from tests.support.wording import Wording

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def untouched(variables) -> Iterator[None]:
    """Ray's variables and the handlers of signals are put back."""
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        variables[name] = ""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (exceptions.RayError("\n  the node died\nstack"), "the node died"),
        (exceptions.RayError(" \n"), "RayError"),
        (exceptions.RayError("x" * 999), "x" * 300),
    ],
)
def test_what_is_lost_says_why_in_a_line(error: Exception, said: str) -> None:
    assert first_line(error) == said


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    """Stands for the module."""
    stand_in = Ray()
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    return stand_in


@pytest.fixture
def listening() -> Iterator[str]:
    """An address at which something listens."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for Ray's own check of a cluster's health."""
    monkeypatch.setattr(sys, "executable", request.param)


# --- how it is reached -----------------------------------------------------------------------------------------------


def test_a_cluster_of_this_machine_is_for_this_run_alone(ray: Ray) -> None:
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


@pytest.mark.parametrize(("is_auto", "program"), [(True, "/bin/false"), (False, "/bin/true")], indirect=["program"])
@pytest.mark.usefixtures("program")
def test_a_cluster_that_is_there_is_only_connected_to(is_auto: bool, listening: str, ray: Ray) -> None:
    address = "auto" if is_auto else listening  # Ray finds its own
    with cluster(address):
        assert ray.is_up
    assert not ray.is_up
    assert ray.asked["address"] == address
    assert "_temp_dir" not in ray.asked
    assert os.environ["RAY_AUTH_MODE"] == "", "whoever made it decides"


@pytest.mark.parametrize(
    ("address", "refusal"),
    [(LOCAL, ValueError("\n too little memory\nmore")), (LOCAL, OSError()), ("auto", ConnectionError("none found"))],
)
def test_a_cluster_that_cannot_be_is_said(address: str, refusal: Exception, wording: Wording, ray: Ray) -> None:
    ray.refusal = refusal
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
    def asked(address: str) -> argparse.Namespace:
        return argparse.Namespace(ray=address, plan=False, container=False, shard=None)

    config = Config(path=None, directory="/", sha256="", adapters=())
    with pytest.raises(GateError) as caught:
        configured(config, asked(address))
    wording(caught.value)
    for fine in ("", "auto", "head:6379", "10.0.0.1:6379", "[::1]:6379"):
        assert configured(config, asked(fine)) is config


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:99999"])
def test_where_nobody_listens_is_no_cluster(address: str, wording: Wording) -> None:
    with pytest.raises(GateError, match=address) as caught:
        run_on_ray._reach(address)
    wording(caught.value)


def test_what_listens_and_says_nothing_is_no_cluster(
    listening: str, monkeypatch: pytest.MonkeyPatch, wording: Wording
) -> None:
    monkeypatch.setattr(run_on_ray, "_HEALTH_S", 0.1)
    with pytest.raises(GateError, match=listening) as caught:
        run_on_ray._reach(listening)
    wording(caught.value)


@pytest.mark.parametrize("program", ["/bin/false"], indirect=True)
@pytest.mark.usefixtures("program")
def test_what_ray_says_of_a_clusters_health_decides(listening: str, wording: Wording) -> None:
    with pytest.raises(GateError, match=listening) as caught:
        run_on_ray._reach(listening)
    wording(caught.value)
