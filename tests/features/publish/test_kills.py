"""Runs that publish and are killed, interrupted, or in each other's way; the real processes, with a played worker."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.support.played_merges import lay
from tests.support.publish_kills import KilledRuns, lay_real

KILLS = 20
ROWS = 50_000


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> KilledRuns:
    place = tmp_path_factory.mktemp("kills")
    lay(place, rows=ROWS)
    return KilledRuns(place, random.Random(28))


@pytest.mark.slow
@pytest.mark.attempt("F03", "kill -9 at 20 moments of publishing", "only whole models have names")
def test_after_kills_only_whole_models_have_names(runs: KilledRuns) -> None:
    outcomes = [runs.kill_once() for _ in range(KILLS)]
    assert outcomes.count("killed") >= KILLS // 2
    runs.finish()


@pytest.mark.nightly
@pytest.mark.attempt("F04", "kill -9 of whole runs, and then an undisturbed one", "whole models, and no leftover")
def test_kills_of_whole_runs_leave_whole_models_only(tmp_path: Path) -> None:
    adapters = lay_real(tmp_path / "place")
    real = KilledRuns(tmp_path / "place", random.Random(1), adapters)
    for _ in range(3):
        real.kill_once()
    real.finish()


@pytest.mark.slow
def test_a_killed_run_without_an_earlier_model_leaves_no_name(runs: KilledRuns) -> None:
    shutil.rmtree(runs.target, ignore_errors=True)
    process = runs.start()
    runs.wait_for_partial(process)
    process.kill()
    process.wait()
    assert runs.named() == []
    assert runs.partials() != []
    runs.finish()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.attempt("F03b", "SIGINT, SIGTERM, SIGHUP while publishing", "no model and no leftover")
def test_an_interrupted_run_leaves_nothing(runs: KilledRuns, number: signal.Signals) -> None:
    shutil.rmtree(runs.target, ignore_errors=True)
    process = runs.start()
    runs.wait_for_partial(process)
    process.send_signal(number)
    assert process.wait() not in (0, -signal.SIGKILL)
    assert (runs.named(), runs.partials()) == ([], [])


@pytest.mark.attempt("F12b", "the disk fills up", "not published, and no leftover")
def test_a_disk_that_fills_up_leaves_nothing(runs: KilledRuns) -> None:
    """A limit on the size of files stands for the disk: the weights do not fit, and the report does."""
    shutil.rmtree(runs.target, ignore_errors=True)
    process = runs.start("bash", "-c", 'ulimit -f 500; exec "$@"', "bash")
    assert process.wait() == 3, (runs.place / "log").read_text()
    assert (runs.named(), runs.partials()) == ([], [])
    report = json.loads((runs.place / "merge-gate-report" / "report.json").read_text())
    assert {adapter["cause"] for adapter in report["adapters"]} == {"not-published"}
    runs.check()


@pytest.mark.attempt("F07", "a second run publishes to the same name", "exit 2")
def test_a_second_publisher_is_refused_while_the_first_is_alive(runs: KilledRuns) -> None:
    shutil.rmtree(runs.target, ignore_errors=True)
    first = runs.start()
    runs.wait_for_partial(first)
    while not [*runs.target.glob(".*/written-by-merge-gate")]:  # it is locked from then on
        assert first.poll() is None
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)
    partials = runs.partials()
    second = runs.start("env", "-C", str(runs.place))
    assert second.wait() == 2
    assert runs.partials() == partials
    first.send_signal(signal.SIGCONT)
    assert first.wait() == 0
    runs.check()
    assert set(runs.named()) == runs.models
