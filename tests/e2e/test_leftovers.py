"""What a run leaves where it is killed, interrupted, or its engine fails: nothing after the next run, a token never."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from merge_gate.action.docker.container import ContainerRun
from merge_gate.action.docker.launcher import run_in_container
from tests.support.e2e.engines import PATIENCE_S, described
from tests.support.e2e.launch import LAUNCH, TOKEN
from tests.support.e2e.proxy import proxy

pytestmark = pytest.mark.e2e


@pytest.fixture
def run(rogue_run: ContainerRun) -> ContainerRun:
    """A container that waits for a minute."""
    rogue_run.config.write_text("sleep 60", encoding="utf-8")
    return rogue_run


@pytest.fixture
def launch(run: ContainerRun) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start the launcher as a process of its own."""
    started = []

    def launch(**environ: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, run.config, run.output, run.image],
            env={**os.environ, **run.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        started.append(process)
        return process

    yield launch
    for process in started:
        process.kill()
        process.communicate()


def left_of(run: ContainerRun) -> list[dict]:
    """What the engine tells of the run's containers, in which no token stands."""
    left = described(run.environ["DOCKER_HOST"], run.output)
    assert TOKEN not in json.dumps(left)
    return left


def wait_for_container(run: ContainerRun, state: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while [one["State"]["Status"] for one in left_of(run)] != [state]:
        assert time.monotonic() < end, left_of(run)
        time.sleep(0.1)


def next_run(run: ContainerRun) -> None:
    config = run.workspace / "next.yml"
    config.write_text("sleep 0", encoding="utf-8")
    assert run_in_container(replace(run, config=config, output=run.output.with_name("next")), print) == 3


def test_a_killed_launcher_leaves_a_container_and_no_token(run: ContainerRun, launch) -> None:
    process = launch()
    wait_for_container(run, "running")
    process.kill()
    process.wait()
    next_run(run)
    assert left_of(run) == []


def test_a_container_of_a_run_that_goes_on_is_left_alone(run: ContainerRun, launch) -> None:
    process = launch()
    wait_for_container(run, "running")
    next_run(run)
    assert [one["State"]["Status"] for one in left_of(run)] == ["running"]
    process.terminate()
    assert process.wait(PATIENCE_S) == 3
    assert left_of(run) == []


def socket_of(run: ContainerRun) -> Path:
    return Path(run.environ["DOCKER_HOST"].removeprefix("unix://"))


@pytest.fixture
def address() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="proxy-") as directory:
        yield Path(directory) / "engine.sock"


@pytest.mark.parametrize("slow_s", [1, 4])
def test_a_signal_while_a_slow_engine_makes_the_container(
    run: ContainerRun, launch, address: Path, slow_s: int
) -> None:
    """It makes it all the same: the launcher waits for it, removes it, and still ends in time."""
    asked = []

    def hook(data: bytes) -> None:
        if b"POST" in data and b"/containers/create" in data:
            asked.append(time.monotonic())
            time.sleep(slow_s)

    with proxy(socket_of(run), address, hook):
        process = launch(DOCKER_HOST=f"unix://{address}")
        end = time.monotonic() + PATIENCE_S
        while not asked:
            assert time.monotonic() < end
            time.sleep(0.05)
        before = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 3
        assert time.monotonic() - before < 7.5
    assert left_of(run) == []


def test_a_container_that_cannot_be_removed_is_named(run: ContainerRun, launch, address: Path) -> None:
    def hook(data: bytes) -> None:
        if b"DELETE " in data:
            raise ConnectionError

    run.config.write_text("sleep 0", encoding="utf-8")
    with proxy(socket_of(run), address, hook):
        process = launch(DOCKER_HOST=f"unix://{address}")
        said, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3, "what the gate inside said stands"
    (left,) = left_of(run)
    assert f"the container {left['Name'].strip('/')} still exists" in said.decode()
    next_run(run)
    assert left_of(run) == []
