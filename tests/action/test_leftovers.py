"""Which containers nobody waits for any longer. Real ones are removed in tests/e2e."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from merge_gate.action.docker import leftovers

LAUNCHER, UNTIL = leftovers._LAUNCHER, leftovers._UNTIL


def test_a_container_of_a_launcher_that_lives_stays() -> None:
    ours = leftovers.labels(60)
    assert ours.items() >= leftovers.LABEL.items()
    assert not leftovers.is_orphan(ours, time.time())
    assert not leftovers.is_orphan(ours, time.time() + 1e6), "as long as its launcher lives"


def test_a_container_of_a_launcher_that_died_goes() -> None:
    code = "import json; from merge_gate.action.docker import leftovers; print(json.dumps(leftovers.labels(60)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert leftovers.is_orphan(eval(done.stdout), time.time())


def test_a_process_id_that_was_given_again_is_another_process() -> None:
    boot, space, process, start = leftovers.labels(60)[LAUNCHER].split("/")
    assert leftovers.is_orphan({LAUNCHER: f"{boot}/{space}/{process}/{int(start) - 1}"}, 0)


@pytest.mark.parametrize("launcher", ["other-boot/1/2/3", "", "nonsense", "{boot}/{space}", "{boot}/{space}/../../1"])
def test_one_of_another_machine_goes_when_its_time_is_over(launcher: str) -> None:
    boot, space, *_ = leftovers.labels(60)[LAUNCHER].split("/")
    ours = {LAUNCHER: launcher.format(boot=boot, space=space), UNTIL: "1000"}
    assert not leftovers.is_orphan(ours, 999)
    assert leftovers.is_orphan(ours, 1001)


@pytest.mark.parametrize("ours", [{}, {UNTIL: "soon"}, {UNTIL: ""}])
def test_one_that_says_nothing_stays(ours: dict[str, str]) -> None:
    assert not leftovers.is_orphan(ours, time.time())
