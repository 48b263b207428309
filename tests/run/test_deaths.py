"""Whole runs over 20 adapters that are merged in one pass, of which one ends the worker: 19 verdicts, one error.

The adapter at fault has a regular expression whose trial takes ten seconds. So the worker is at that adapter when it
gets a signal, or when the memory of its cgroup is used up.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from merge_gate.config.load_config import load_config
from merge_gate.records.options import RunOptions
from merge_gate.records.report import Report
from merge_gate.records.terms import Verdict
from merge_gate.run import flow, groups
from merge_gate.run.flow import run_gate
from merge_gate.worker import process, supervisor
from merge_gate.worker.memory import MemoryGroup
from merge_gate.worker.protocol import DeviceChosen, Event, InProgress, MergeStarted
from tests.support.command import children_of
from tests.support.e2e.limits import IS_V1, can_limit_memory, memory_limit
from tests.support.faults import configure
from tests.support.models import Shelf

ADAPTERS, AT_FAULT = 20, 5
ENDLESS = "(([a-z0-9_.])+)+!"
LIMIT_BYTES = 512 << 20

BALLAST = """
import pathlib, sys
events = pathlib.Path(sys.argv[1])
before, held = events.read_text(), []
while events.read_text() == before:
    held.append(bytearray(b"x" * (8 << 20)))
"""
"""Takes memory of its cgroup until the kernel has ended another process there, and perhaps this one after it."""


@pytest.fixture
def place(shelf: Shelf, tmp_path: Path) -> Path:
    shutil.copytree(shelf.base("llama"), tmp_path / "base")
    for number in range(ADAPTERS):
        shutil.copytree(shelf.adapter("plain"), tmp_path / "adapters" / f"adapter-{number:02}")
    configure(target_modules=ENDLESS)(tmp_path / "adapters" / f"adapter-{AT_FAULT:02}")
    config = {"version": 1, "base": "./base", "adapters": ["./adapters/*"], "checks": {"base-mismatch": "off"}}
    (tmp_path / "gate.yml").write_text(json.dumps(config))
    return tmp_path


def judged(place: Path, monkeypatch: pytest.MonkeyPatch, at: Callable[[Event], None]) -> tuple[Report, list[Event]]:
    """A run whose base is read in a pass, as one that is larger than the memory. `at` gets each event first."""
    events: list[Event] = []

    def supervise(job: Any, listen: Callable[[Event], None], *others: Any, **more: Any) -> None:
        def listen_first(event: Event) -> None:
            events.append(event)
            at(event)
            listen(event)

        supervisor.supervise(job, listen_first, *others, **more)

    monkeypatch.setattr(groups, "too_large", lambda *_: "larger than the memory")
    monkeypatch.setattr(flow, "supervise", supervise)
    return run_gate(load_config(str(place / "gate.yml")), RunOptions(device="cpu")), events


def is_at_fault(event: Event) -> bool:
    """Whether the worker is at the adapter now, in a pass or alone."""
    return event == InProgress(task=AT_FAULT) or event == MergeStarted(task=AT_FAULT)


def check(report: Report, events: list[Event], words: str) -> None:
    verdicts = {one.name: one.verdict for one in report.adapters}
    assert verdicts == {
        f"adapter-{number:02}": Verdict.ERROR if number == AT_FAULT else Verdict.PASSED for number in range(ADAPTERS)
    }
    assert any(words in finding.message for finding in report.adapters[AT_FAULT].findings)
    passes = [len(event.others) + 1 for event in events if isinstance(event, MergeStarted)]
    assert passes == [ADAPTERS, ADAPTERS - 1, 1], "the others were merged in one pass again"


def worker() -> int:
    (child,) = children_of(os.getpid())
    return child


@pytest.mark.slow
def test_an_adapter_that_crashes_the_worker_costs_its_verdict(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(event: Event) -> None:
        if is_at_fault(event):
            os.kill(worker(), signal.SIGSEGV)

    report, events = judged(place, monkeypatch, crash)
    check(report, events, "SIGSEGV")


@pytest.mark.slow
@pytest.mark.skipif(not can_limit_memory(), reason="no cgroup with a memory limit can be made here")
def test_an_adapter_without_enough_memory_costs_its_own_verdict(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel ends the worker, because another process of its cgroup takes the memory."""
    with memory_limit(LIMIT_BYTES) as enter:
        group = Path(enter[-1])
        (place / "proc").write_text(f"4:memory:/{group.name}\n" if IS_V1 else f"0::/{group.name}\n")
        counter = group / ("memory.oom_control" if IS_V1 else "memory.events")

        def exhaust(event: Event) -> None:
            if isinstance(event, DeviceChosen):
                (group / "cgroup.procs").write_text(str(worker()))
                Path(f"/proc/{worker()}/oom_score_adj").write_text("1000")  # it is ended first
            elif is_at_fault(event):
                subprocess.run([*enter, sys.executable, "-c", BALLAST, str(counter)], check=False)

        monkeypatch.setattr(process, "MemoryGroup", lambda: MemoryGroup(place / "proc"))
        report, events = judged(place, monkeypatch, exhaust)
        check(report, events, "out of memory")
