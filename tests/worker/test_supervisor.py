"""The supervisor and its child process: what a death costs, and that nobody outlives anybody.

A child that must hang at a known place is given a regular expression that takes ten seconds of trial, or is stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from merge_gate.files.preflight import preflight
from merge_gate.records.refusals import NotJudged, PatternRefused
from merge_gate.records.terms import BaseKey
from merge_gate.worker.process import WorkerProcess
from merge_gate.worker.protocol import (
    BaseLoading,
    DeviceChosen,
    Event,
    Finished,
    Group,
    Idle,
    Job,
    Merged,
    MergeStarted,
    Task,
    Undecided,
    Waiting,
)
from merge_gate.worker.supervisor import Attempt, supervise
from tests.support.command import alive, children_of, wait_until

if TYPE_CHECKING:
    from merge_gate.records.files import AdapterFiles
    from tests.support.models import Shelf
    from tests.support.wording import Wording


ENDLESS = "(([a-z0-9_.])+)+!"


@pytest.fixture
def adapters(shelf: Shelf, tmp_path: Path) -> list[AdapterFiles]:
    """Three sound adapters; `hang` makes one of them a trap."""
    for number in range(3):
        shutil.copytree(shelf.adapter("plain"), tmp_path / f"adapter-{number}")
    return [preflight(str(tmp_path / f"adapter-{number}"), allow_pickle=False) for number in range(3)]


def hang(files: AdapterFiles) -> AdapterFiles:
    path = Path(files.directory, "adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ENDLESS}))
    return preflight(files.directory, allow_pickle=False)


def group(base: Path, adapters: list[AdapterFiles], *, first: int = 0) -> Group:
    tasks = tuple(Task(index=first + number, files=(files,)) for number, files in enumerate(adapters))
    return Group(
        base=BaseKey(model=base.name, revision=None, dtype="float32", quantization="none"),
        directory=str(base),
        tasks=tasks,
    )


class Killer:
    """Hears everything, and sends a signal to the child of the moment when an event that it waits for has come."""

    def __init__(self, *when: Event, number: signal.Signals = signal.SIGKILL) -> None:
        self._number = number
        self.heard: list[Event] = []
        self._when = when

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Idle):
            self.heard.append(event)
        if event in self._when:
            (child,) = children_of(os.getpid())
            os.kill(child, self._number)

    def outcomes(self) -> dict[int, str]:
        ends = [event for event in self.heard if isinstance(event, Merged | Undecided)]
        assert max(Counter(event.task for event in ends).values()) == 1, "no task may be settled twice"
        return {event.task: type(event).__name__ for event in ends}

    def refusal(self, task: int) -> NotJudged:
        (found,) = [event.refusal for event in self.heard if isinstance(event, Undecided) and event.task == task]
        assert isinstance(found, NotJudged)
        return found


def run(job: Job, killer: Killer) -> None:
    with WorkerProcess() as child:
        supervise(job, killer, child)


def deed(refusal: NotJudged) -> str:
    """What was being done, without how the child ended: those words are in the golden of test_process.py."""
    return refusal.message.partition(": ")[0]


def test_each_task_is_merged_in_order_and_the_child_ends(shelf: Shelf, adapters: list[AdapterFiles]) -> None:
    killer = Killer()
    with WorkerProcess() as child:
        supervise(Job(groups=(group(shelf.base("llama"), adapters),)), killer, child)
        assert child._process.poll() == 0
    assert killer.outcomes() == {0: "Merged", 1: "Merged", 2: "Merged"}
    assert [event.task for event in killer.heard if isinstance(event, MergeStarted)] == [0, 1, 2]
    assert isinstance(killer.heard[0], DeviceChosen)
    assert killer.heard[0].device == "cpu" or killer.heard[0].device.startswith("cuda")
    assert isinstance(killer.heard[-1], Finished)


def test_a_death_within_an_adapter_costs_that_adapter(
    shelf: Shelf, adapters: list[AdapterFiles], wording: Wording
) -> None:
    adapters[1] = hang(adapters[1])
    killer = Killer(MergeStarted(task=1))
    run(Job(groups=(group(shelf.base("llama"), adapters),)), killer)
    assert killer.outcomes() == {0: "Merged", 1: "Undecided", 2: "Merged"}
    refusal = killer.refusal(1)
    assert "SIGKILL" in refusal.message
    assert refusal.hint
    wording(deed(refusal))


def one_pass(base: Path, adapters: list[AdapterFiles]) -> Job:
    return Job(groups=(replace(group(base, adapters), one_pass=True),))


def test_adapters_are_merged_in_one_pass(shelf: Shelf, adapters: list[AdapterFiles]) -> None:
    together, alone = Killer(), Killer()
    run(one_pass(shelf.base("llama"), adapters), together)
    run(Job(groups=(group(shelf.base("llama"), adapters),)), alone)
    assert [event for event in together.heard if isinstance(event, MergeStarted)] == [
        MergeStarted(task=0, others=(1, 2))
    ]
    evidence = [
        [replace(event.evidence, seconds=0.0, witnessed=()) for event in one.heard if isinstance(event, Merged)]
        for one in (together, alone)
    ]
    assert evidence[0] == evidence[1]
    assert together.outcomes() == dict.fromkeys(range(3), "Merged")


def test_a_death_within_a_pass_costs_the_adapter_at_fault_only(shelf: Shelf, adapters: list[AdapterFiles]) -> None:
    adapters[1] = hang(adapters[1])
    killer = Killer(MergeStarted(task=0, others=(1, 2)), MergeStarted(task=1))
    run(one_pass(shelf.base("llama"), adapters), killer)
    assert killer.outcomes() == {0: "Merged", 1: "Undecided", 2: "Merged"}
    started = [event for event in killer.heard if isinstance(event, MergeStarted)]
    assert [(event.task, event.others) for event in started] == [(0, (1, 2)), (0, ()), (1, ()), (2, ())]


def test_an_adapter_that_cannot_be_read_costs_the_others_no_verdict(shelf: Shelf, adapters: list[AdapterFiles]) -> None:
    broken = replace(adapters[1].files[0], sha256="0" * 64)
    adapters[1] = replace(adapters[1], files=(broken, *adapters[1].files[1:]))
    killer = Killer()
    run(one_pass(shelf.base("llama"), adapters), killer)
    assert killer.outcomes() == {0: "Merged", 1: "Undecided", 2: "Merged"}


def test_a_pass_has_the_time_of_its_adapters_together(shelf: Shelf, adapters: list[AdapterFiles]) -> None:
    job = one_pass(shelf.base("llama"), adapters)
    attempt = Attempt(job, Killer())
    attempt.receive(MergeStarted(task=0, others=(1, 2)))
    assert attempt._limit_s == sum(task.limit_s for task in job.groups[0].tasks)
    assert attempt.is_at_a_batch
    attempt.receive(MergeStarted(task=1))
    assert not attempt.is_at_a_batch


def test_a_death_while_a_base_loads_costs_the_adapters_on_that_base(
    shelf: Shelf, adapters: list[AdapterFiles], tmp_path: Path, wording: Wording
) -> None:
    slow = shutil.copytree(shelf.base("llama"), tmp_path / "slow")
    killer = Killer(BaseLoading(group=0))
    run(Job(groups=(group(slow, adapters[:2]), group(shelf.base("llama"), adapters[2:], first=2))), killer)
    assert killer.outcomes() == {0: "Undecided", 1: "Undecided", 2: "Merged"}
    wording(deed(killer.refusal(0)))


def test_a_child_that_dies_at_once_costs_nothing(shelf: Shelf, adapters: list[AdapterFiles]) -> None:
    killer = Killer()
    with WorkerProcess() as child:
        child._process.kill()
        supervise(Job(groups=(group(shelf.base("llama"), adapters),)), killer, child)
    assert killer.outcomes() == dict.fromkeys(range(3), "Merged")


def test_a_death_right_after_a_base_was_loaded_costs_nothing(shelf: Shelf, adapters: list[AdapterFiles]) -> None:
    heard: list[Event] = []

    def listen(event: Event) -> None:
        heard.append(event)
        if isinstance(event, BaseLoading) and len([one for one in heard if isinstance(one, BaseLoading)]) == 1:
            os.kill(children_of(os.getpid())[0], signal.SIGKILL)

    supervise(Job(groups=(group(shelf.base("llama"), adapters),)), listen)
    assert sorted(event.task for event in heard if isinstance(event, Merged)) == [0, 1, 2]


def test_children_that_die_at_once_are_not_started_forever(
    shelf: Shelf, adapters: list[AdapterFiles], monkeypatch: pytest.MonkeyPatch, wording: Wording
) -> None:
    monkeypatch.setattr("merge_gate.worker.process._BOOTSTRAP", "raise SystemExit('no torch here')")
    killer = Killer()
    supervise(Job(groups=(group(shelf.base("llama"), adapters),)), killer)
    assert killer.outcomes() == dict.fromkeys(range(3), "Undecided")
    assert "no torch here" in killer.refusal(2).message
    wording(deed(killer.refusal(2)))


# --- time limits -----------------------------------------------------------------------------------------------------


def limited(group: Group, *tasks: int, seconds: float = 2.0) -> Group:
    """With a time limit for these tasks alone: on a busy machine the others may take longer."""
    return replace(
        group,
        tasks=tuple(replace(task, limit_s=seconds) if task.index in tasks else task for task in group.tasks),
    )


def test_an_adapter_over_its_time_limit_is_alone_in_that(
    shelf: Shelf, adapters: list[AdapterFiles], monkeypatch: pytest.MonkeyPatch, wording: Wording
) -> None:
    """And it is named while it hangs."""
    monkeypatch.setattr("merge_gate.worker.supervisor.FIRST_WORD_S", 0.5)
    adapters[1] = hang(adapters[1])
    killer = Killer()
    supervise(Job(groups=(limited(group(shelf.base("llama"), adapters), 1),)), killer)
    assert killer.outcomes() == {0: "Merged", 1: "Undecided", 2: "Merged"}
    wording(killer.refusal(1))
    waiting = [event for event in killer.heard if isinstance(event, Waiting) and event.task == 1]
    assert waiting, "and on a busy machine others too"
    assert [event.limit_s for event in waiting] == [2.0] * len(waiting)
    assert len(waiting) <= 3, "each time after twice as long"


def test_a_base_that_never_loads_costs_the_adapters_on_it(
    shelf: Shelf, adapters: list[AdapterFiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wording: Wording
) -> None:
    """And it is named while it loads."""
    monkeypatch.setattr("merge_gate.worker.supervisor.FIRST_WORD_S", 0.5)
    slow = shutil.copytree(shelf.base("llama"), tmp_path / "slow")
    killer = Killer(BaseLoading(group=0), number=signal.SIGSTOP)
    stopped = limited(group(slow, adapters[:2]), 0, 1)
    supervise(Job(groups=(stopped, group(shelf.base("llama"), adapters[2:], first=2))), killer)
    assert killer.outcomes() == {0: "Undecided", 1: "Undecided", 2: "Merged"}
    wording(killer.refusal(0))
    waiting = [event for event in killer.heard if isinstance(event, Waiting) and event.base == "slow"]
    assert waiting, "and on a busy machine others too"
    assert {(event.task, event.limit_s) for event in waiting} == {(None, 2.0)}


def test_a_base_that_could_not_be_loaded_is_not_said_to_be_loading(
    shelf: Shelf, adapters: list[AdapterFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merge_gate.worker.supervisor.FIRST_WORD_S", 0.0)
    killer = Killer()
    attempt = Attempt(Job(groups=(group(shelf.base("llama"), adapters),)), killer)
    attempt.receive(BaseLoading(group=0))
    attempt.receive(Idle())
    attempt.receive(Undecided(task=0, refusal=NotJudged(message="m")))
    attempt.receive(Idle())
    assert len([event for event in killer.heard if isinstance(event, Waiting)]) == 1


@pytest.mark.slow
def test_an_expression_without_end_is_the_adapters_fault(shelf: Shelf, adapters: list[AdapterFiles]) -> None:
    """Within its time limit: the trial ends, and says which expression it is."""
    adapters[0] = hang(adapters[0])
    killer = Killer()
    supervise(Job(groups=(group(shelf.base("llama"), adapters[:1]),)), killer)
    (merged,) = [event for event in killer.heard if isinstance(event, Merged)]
    refusal = merged.evidence.refusal
    assert isinstance(refusal, PatternRefused)
    assert refusal.pattern is not None
    assert (refusal.pattern.text, refusal.problem) == (ENDLESS, None)


# --- accounts --------------------------------------------------------------------------------------------------------


def test_a_child_that_forgets_an_adapter_does_not_make_it_disappear(
    shelf: Shelf, adapters: list[AdapterFiles], wording: Wording
) -> None:
    killer = Killer()
    attempt = Attempt(Job(groups=(group(shelf.base("llama"), adapters),)), killer)
    attempt.receive(Undecided(task=0, refusal=NotJudged(message="m")))
    attempt.receive(Finished())
    attempt.settle_rest()
    assert killer.outcomes() == dict.fromkeys(range(3), "Undecided")
    wording(killer.refusal(1))


def test_a_death_between_two_adapters_costs_none(shelf: Shelf, adapters: list[AdapterFiles]) -> None:
    attempt = Attempt(Job(groups=(group(shelf.base("llama"), adapters),)), Killer())
    attempt.receive(MergeStarted(task=0))
    attempt.receive(Undecided(task=0, refusal=NotJudged(message="m")))
    assert not attempt.is_at_an_adapter
    assert [task.index for one in attempt.left().groups for task in one.tasks] == [1, 2]


def test_what_the_listener_raises_ends_the_child(shelf: Shelf, adapters: list[AdapterFiles]) -> None:
    class Stop(BaseException):
        pass

    def listen(event: Event) -> None:
        raise Stop

    child = WorkerProcess()
    with pytest.raises(Stop), child:
        supervise(Job(groups=(group(shelf.base("llama"), adapters),)), listen, child)
    assert child._process.poll() == -signal.SIGKILL


def test_a_broken_pipe_of_the_listener_is_not_taken_for_the_childs(shelf: Shelf, adapters: list[AdapterFiles]) -> None:
    def listen(event: Event) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        supervise(Job(groups=(group(shelf.base("llama"), adapters),)), listen)


def test_a_child_without_a_job_leaves_when_it_is_let_go() -> None:
    with WorkerProcess() as child:
        pid = child._process.pid
        child._channel.close()
        wait_until(lambda: not alive(pid))
        assert child._process.wait() == 0


def test_a_job_without_tasks_starts_nothing(shelf: Shelf) -> None:
    killer = Killer()
    supervise(Job(groups=(group(shelf.base("llama"), []),)), killer)
    assert killer.heard == []
