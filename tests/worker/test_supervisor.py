"""The supervisor and its child process: what a death costs, and that nobody outlives anybody.

Most children are played (tests/support/played_worker.py). A real one that must hang at a known place is given a regular
expression that takes ten seconds of trial.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from merge_gate.features.stream.batches import batches
from merge_gate.files.preflight import preflight
from merge_gate.records.refusals import NotJudged, Refusal
from merge_gate.records.terms import BaseKey
from merge_gate.worker import supervisor
from merge_gate.worker.channel import GarbledError
from merge_gate.worker.process import WorkerProcess
from merge_gate.worker.protocol import (
    ALONE,
    SUSPECTED,
    TOGETHER,
    BaseLoading,
    DeviceChosen,
    Event,
    Finished,
    ForwardRunning,
    Group,
    Idle,
    InProgress,
    Job,
    Merged,
    MergeProgressed,
    MergeStarted,
    Task,
    Unjudged,
)
from merge_gate.worker.supervisor import Attempt, WorkerSlot, supervise
from tests.support.command import alive, children_of, wait_until
from tests.support.engine.base_headers import base_files
from tests.support.engine.merges import RUNS
from tests.support.faults import configure
from tests.support.played_worker import other_workers, plan, played_workers

if TYPE_CHECKING:
    from merge_gate.records.files import AdapterFiles
    from tests.support.models import Shelf
    from tests.support.wording import Wording


ENDLESS = "(([a-z0-9_.])+)+!"
TIMEOUT_S = 1.0


@pytest.fixture
def adapters(shelf: Shelf, tmp_path: Path) -> list[AdapterFiles]:
    return sound(3, shelf, tmp_path)


def sound(count: int, shelf: Shelf, place: Path) -> list[AdapterFiles]:
    """Sound adapters; `hang` makes one of them a trap."""
    directories = [place / f"adapter-{number}" for number in range(count)]
    for directory in directories:
        shutil.copytree(shelf.adapter("plain"), directory)
    return [preflight(str(directory), allow_pickle=False) for directory in directories]


def hang(files: AdapterFiles) -> AdapterFiles:
    path = Path(files.directory, "adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ENDLESS}))
    return preflight(files.directory, allow_pickle=False)


def group(base: Path, adapters: list[AdapterFiles], *, first: int = 0) -> Group:
    tasks = tuple(Task(index=first + n, files=(files,), consumers=RUNS) for n, files in enumerate(adapters))
    return Group(
        base=BaseKey(model=base.name, revision=None, dtype="float32", quantization="none"),
        directory=str(base),
        files=base_files(base),
        tasks=tasks,
    )


def limited(group: Group, *tasks: int) -> Group:
    """With a time limit for these tasks alone: on a busy machine the others may take longer."""
    return replace(
        group, tasks=tuple(replace(task, timeout_s=TIMEOUT_S) if task.index in tasks else task for task in group.tasks)
    )


class Killer:
    """Hears everything. When an event comes, it sends the child of the moment the next signal of that event's list."""

    def __init__(self, when: dict[Event, list[signal.Signals]] | None = None) -> None:
        self.heard: list[Event] = []
        self._when = when or {}

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Idle) or event.timeout_s:
            self.heard.append(event)
        if isinstance(event, BaseLoading | MergeStarted | InProgress) and self._when.get(event):
            (child,) = children_of(os.getpid())
            os.kill(child, self._when[event].pop(0))

    def outcomes(self) -> dict[int, str]:
        ends = [event for event in self.heard if isinstance(event, Merged | Unjudged)]
        assert max(Counter(event.task for event in ends).values()) == 1, "no task may be settled twice"
        return {event.task: type(event).__name__ for event in ends}

    def refusal(self, task: int) -> NotJudged:
        (found,) = [event.refusal for event in self.heard if isinstance(event, Unjudged) and event.task == task]
        assert isinstance(found, NotJudged)
        return found


def process_of(worker: WorkerSlot) -> subprocess.Popen[bytes]:
    """The process that the slot holds now."""
    worker.start()
    assert worker._process is not None
    return worker._process._process


# --- what a death costs ----------------------------------------------------------------------------------------------


def deed(refusal: NotJudged) -> str:
    """What was being done, without how the child ended: those words are in the golden of test_process.py."""
    return refusal.message.partition(": ")[0]


@pytest.fixture(scope="module")
def deaths(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Killer:
    """One job whose children end in every way, one after another: seven starts instead of one job for each way.

    The first child is killed before it has the job. Then each base has its own accident:

    0. Each child that loads it is killed. 1. The first child that loads it is killed, and the child that merges adapter
    3. 2. Adapter 6 takes longer than it may. 3. The child stops while it loads the base. 4. None.
    """
    place = tmp_path_factory.mktemp("deaths")
    killed, llama, other, stopped, last = (copied(shelf, place / name) for name in ("killed", "l", "o", "stopped", "z"))
    files = sound(11, shelf, place)
    plan(killed, load="kill kill")
    plan(llama, load="kill")
    plan(stopped, load="hang")
    plan(files[3].directory, merge="kill")
    plan(files[6].directory, merge="hang")
    groups = (
        group(killed, files[:2]),
        group(llama, files[2:5], first=2),
        limited(group(other, files[5:8], first=5), 6),
        limited(group(stopped, files[8:10], first=8), 8, 9),
        group(last, files[10:], first=10),
    )
    killer = Killer()
    with pytest.MonkeyPatch.context() as patch, played_workers(place), WorkerSlot() as worker:
        patch.setattr("merge_gate.worker.supervisor.FIRST_NOTE_S", 0.25)
        process_of(worker).kill()
        supervise(Job(groups=groups), killer, worker)
    return killer


def copied(shelf: Shelf, directory: Path) -> Path:
    """A base of its own, for which accidents can be planned."""
    return shutil.copytree(shelf.base("llama"), directory)


def test_a_child_that_dies_at_once_costs_nothing(deaths: Killer) -> None:
    """What no later accident hit is merged, though the first child of the job was killed before it had the job."""
    merged = {task for task, outcome in deaths.outcomes().items() if outcome == "Merged"}
    assert merged == {2, 4, 5, 7, 10}
    assert len(deaths.outcomes()) == 11


def test_a_death_within_an_adapter_costs_that_adapter(deaths: Killer, wording: Wording) -> None:
    assert [deaths.outcomes()[task] for task in (2, 3, 4)] == ["Merged", "Unjudged", "Merged"]
    refusal = deaths.refusal(3)
    assert "SIGKILL" in refusal.message
    assert refusal.hint
    wording(deed(refusal))


def test_a_death_while_a_base_loads_costs_its_adapters(deaths: Killer, wording: Wording) -> None:
    assert [deaths.outcomes()[task] for task in (0, 1, 2)] == ["Unjudged", "Unjudged", "Merged"]
    wording(deed(deaths.refusal(0)))


def test_a_single_death_while_a_base_loads_costs_nothing(deaths: Killer) -> None:
    """The third load is that of the child after adapter 3."""
    assert [event for event in deaths.heard if event == BaseLoading(group=1)] == [BaseLoading(group=1)] * 3
    assert [deaths.outcomes()[task] for task in (2, 4)] == ["Merged", "Merged"]


def test_an_adapter_over_its_time_limit_is_alone_in_that(deaths: Killer, wording: Wording) -> None:
    """And it is named while it hangs."""
    assert [deaths.outcomes()[task] for task in (5, 6, 7)] == ["Merged", "Unjudged", "Merged"]
    wording(deaths.refusal(6))
    waiting = [event for event in deaths.heard if isinstance(event, Idle) and event.task == 6]
    assert waiting, "and on a busy machine others too"
    assert [event.timeout_s for event in waiting] == [TIMEOUT_S] * len(waiting)
    assert len(waiting) <= 3, "each time after twice as long"


def test_a_base_that_never_loads_costs_the_adapters_on_it(deaths: Killer, wording: Wording) -> None:
    """And it is named while it loads."""
    assert [deaths.outcomes()[task] for task in (8, 9, 10)] == ["Unjudged", "Unjudged", "Merged"]
    wording(deaths.refusal(8))
    waiting = [event for event in deaths.heard if isinstance(event, Idle) and event.base == "stopped"]
    assert waiting, "and on a busy machine others too"
    assert {(event.task, event.timeout_s) for event in waiting} == {(None, TIMEOUT_S)}


@pytest.fixture(scope="module")
def alone(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Killer:
    """Three sound adapters, merged one after another by a child that ends by itself."""
    killer = Killer()
    with WorkerSlot() as worker:
        child = process_of(worker)
        files = sound(3, shelf, tmp_path_factory.mktemp("alone"))
        supervise(Job(groups=(group(shelf.base("llama"), files),)), killer, worker)
        assert child.poll() == 0
    return killer


def test_each_task_is_merged_in_order_and_the_child_ends(alone: Killer) -> None:
    assert alone.outcomes() == {0: "Merged", 1: "Merged", 2: "Merged"}
    assert [event.task for event in alone.heard if isinstance(event, MergeStarted)] == [0, 1, 2]
    assert isinstance(alone.heard[0], DeviceChosen)
    assert alone.heard[0].device == "cpu" or alone.heard[0].device.startswith("cuda")
    assert isinstance(alone.heard[-1], Finished)
    assert [event for event in alone.heard if isinstance(event, ForwardRunning) and event.task == 1] == [
        ForwardRunning(task=1, is_running=True),
        ForwardRunning(task=1, is_running=False),
    ]


# --- one pass over a base for several adapters -----------------------------------------------------------------------


def one_pass(base: Path, adapters: list[AdapterFiles], *, first: int = 0) -> Group:
    return replace(group(base, adapters, first=first), one_pass=True)


def started(killer: Killer, *tasks: int) -> list[tuple[int, tuple[int, ...]]]:
    return [
        (event.task, event.others) for event in killer.heard if isinstance(event, MergeStarted) and event.task in tasks
    ]


@pytest.mark.slow
def test_adapters_are_merged_in_one_pass(shelf: Shelf, alone: Killer, tmp_path: Path) -> None:
    """The last one cannot be read, which costs the others no verdict."""
    files = sound(4, shelf, tmp_path)
    broken = replace(files[3].files[0], sha256="0" * 64)
    files[3] = replace(files[3], files=(broken, *files[3].files[1:]))
    killer = Killer()
    with WorkerSlot() as worker:
        supervise(Job(groups=(one_pass(shelf.base("llama"), files),)), killer, worker)
    assert killer.outcomes() == dict.fromkeys(range(3), "Merged") | {3: "Unjudged"}
    assert started(killer, 0, 1, 2) == [(0, (1, 2, 3))]
    evidence = [
        [
            replace(
                event.evidence,
                seconds=0.0,
                cross_checked=(),
                forward=replace(event.evidence.forward, largest_difference=None),
            )
            for event in one.heard
            if isinstance(event, Merged)
        ]
        for one in (killer, alone)
    ]
    assert evidence[0] == evidence[1]


def test_a_death_within_a_pass_costs_the_adapter_at_fault_only(shelf: Shelf, tmp_path: Path) -> None:
    """Another child merges the others in a pass, and is killed when it merges adapter 1 alone."""
    files = sound(3, shelf, tmp_path)
    plan(files[1].directory, merge="kill kill")
    killer = Killer()
    with played_workers(tmp_path), WorkerSlot() as worker:
        supervise(Job(groups=(one_pass(shelf.base("llama"), files),)), killer, worker)
    assert killer.outcomes() == {0: "Merged", 1: "Unjudged", 2: "Merged"}
    assert started(killer, 0, 1, 2) == [(0, (1, 2)), (0, (2,)), (1, ())]


# --- models that run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def accidents(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Killer:
    """A job whose models end in every way: alone (0 to 3), and in a pass of three, of which one is killed."""
    place = tmp_path_factory.mktemp("accidents")
    files = sound(7, shelf, place)
    for number, run in {0: "kill kill", 1: "hang hang", 2: "abort abort", 5: "kill kill"}.items():
        plan(files[number].directory, run=run)
    groups = (
        limited(group(shelf.base("llama"), files[:4]), 1),
        one_pass(copied(shelf, place / "llama"), files[4:], first=4),
    )
    killer = Killer()
    with played_workers(place), WorkerSlot() as worker:
        supervise(Job(groups=groups), killer, worker)
    return killer


def why_not_run(killer: Killer) -> dict[int, str | None]:
    return {event.task: event.evidence.forward.why_not for event in killer.heard if isinstance(event, Merged)}


def test_a_model_that_dies_or_hangs_costs_its_measurement(accidents: Killer, wording: Wording) -> None:
    assert accidents.outcomes() == dict.fromkeys(range(7), "Merged")
    why = why_not_run(accidents)
    for task, how in ((0, "SIGKILL"), (1, "time limit"), (2, "SIGABRT")):
        assert how in (why[task] or "")
        assert started(accidents, task) == [(task, ())] * (3 if task == 0 else 2), "the base runs alone once"
    wording(*((why[task] or "").partition(": ")[0] for task in (0, 1)))
    assert why[3] is None
    assert started(accidents, 3) == [(3, ())]


def test_after_a_death_of_models_in_a_pass_each_runs_alone(accidents: Killer) -> None:
    why = why_not_run(accidents)
    assert "SIGKILL" in (why[5] or "")
    assert why[4] is why[6] is None
    assert started(accidents, 4, 5, 6) == [(4, (5, 6)), (4, ()), (5, ()), (5, ()), (6, ())]


@pytest.mark.parametrize("passes", [False, True])
def test_a_base_that_hangs_is_not_run_again(
    passes: bool, shelf: Shelf, adapters: list[AdapterFiles], tmp_path: Path, wording: Wording
) -> None:
    base = copied(shelf, tmp_path / "base")
    plan(base, run="hang hang")
    killer, one = Killer(), limited((one_pass if passes else group)(base, adapters), 0, 1)
    off = one.tasks[2].without("forward", "forward is off")
    with played_workers(tmp_path), WorkerSlot() as worker:
        supervise(Job(groups=(replace(one, tasks=(*one.tasks[:2], off)),)), killer, worker)
    assert killer.outcomes() == dict.fromkeys(range(3), "Merged")
    why = why_not_run(killer)
    assert why[0] == why[1]
    assert "the base" in (why[0] or "")
    assert why[2] == "forward is off"
    assert sum(isinstance(event, BaseLoading) for event in killer.heard) == 3, "two processes died"
    ran = [event for event in killer.heard if isinstance(event, ForwardRunning)]
    assert {event.task for event in ran if event.is_running} == {0, 1}, "so no verdict is stored"
    assert all(event.is_running for event in ran)
    wording((why[0] or "").partition(": ")[0])


KILLED_MODEL = """
import merge_gate.worker.child as child
def with_accident(import_engine=child._import_engine):
    import_engine()
    import os, signal
    from merge_gate.features.forward import consumer
    def run_adapters(base, models, *others, run=consumer.run_adapters):
        layers = (layer for model in models for layer in model.modules() if hasattr(layer, "lora_alpha"))
        if any(layer.lora_alpha["default"] == 1 for layer in layers):
            os.kill(os.getpid(), signal.SIGKILL)
        return run(base, models, *others)
    consumer.run_adapters = run_adapters
child._import_engine = with_accident
child.main(*descriptors)
"""
"""An adapter with this lora_alpha ends the process when it is run as a model."""


@pytest.mark.slow
def test_real_workers_die_as_played_ones_do(shelf: Shelf, adapters: list[AdapterFiles], tmp_path: Path) -> None:
    """At the load of the base, in the model of adapter 0, in the merge of adapter 1, and past the limit of 2."""
    configure(lora_alpha=1)(Path(adapters[0].directory))
    files = [preflight(adapters[0].directory, allow_pickle=False), hang(adapters[1]), hang(adapters[2])]
    killer = Killer({BaseLoading(group=0): [signal.SIGKILL], MergeStarted(task=1): [signal.SIGKILL]})
    with other_workers(tmp_path, KILLED_MODEL), WorkerSlot() as worker:
        files += sound(1, shelf, tmp_path / "more")
        supervise(Job(groups=(limited(group(shelf.base("llama"), files), 2),)), killer, worker)
    assert killer.outcomes() == {0: "Merged", 1: "Unjudged", 2: "Unjudged", 3: "Merged"}
    assert "SIGKILL" in (why_not_run(killer)[0] or "")
    assert why_not_run(killer)[3] is None
    assert "SIGKILL" in killer.refusal(1).message
    assert "time limit" in killer.refusal(2).message


def test_a_task_that_is_not_to_be_run_is_not(shelf: Shelf, adapters: list[AdapterFiles]) -> None:
    """It says so."""
    killer, one = Killer(), group(shelf.base("llama"), adapters[:1])
    tasks = (one.tasks[0].without("forward", "forward is off"),)
    with WorkerSlot() as worker:
        supervise(Job(groups=(replace(one, tasks=tasks),)), killer, worker)
    assert why_not_run(killer) == {0: "forward is off"}
    assert not [event for event in killer.heard if isinstance(event, ForwardRunning)]


def begun(job: Job, *events: Event) -> Attempt:
    """A process that loaded the first base, and then sent these events."""
    attempt = Attempt(job, Killer())
    for event in (BaseLoading(group=0), *events):
        attempt.receive(event)
    return attempt


DEATH = NotJudged(message="killed", hint="hint")


def test_a_death_of_models_is_blamed_on_no_merge(shelf: Shelf, adapters: list[AdapterFiles]) -> None:
    job = Job(groups=(one_pass(shelf.base("llama"), adapters),))
    running = [ForwardRunning(task=task, is_running=True) for task in (0, 1)]
    ended = [replace(event, is_running=False) for event in running]
    merging = MergeStarted(task=0, others=(1, 2))
    assert turns(begun(job, merging, *running)) == {0: ALONE, 1: ALONE, 2: TOGETHER}
    assert turns(begun(job, merging, *running, *ended, InProgress(task=2))) == {0: TOGETHER, 1: TOGETHER, 2: SUSPECTED}
    left = begun(job, merging, *running, *ended, running[1]).remaining_job(DEATH, set())
    assert [bool(task.why_not("forward")) for task in left.groups[0].tasks] == [False, True, False]
    assert {task.turn for task in left.groups[0].tasks} == {TOGETHER}


RAN = (ForwardRunning(task=0, is_running=True), ForwardRunning(task=0, is_running=False))


@pytest.mark.parametrize(
    ("why_not", "events"),
    [
        ("forward is off", (MergeStarted(task=0), *RAN[:1])),
        ("", (MergeStarted(task=0), *RAN, *RAN[:1], ForwardRunning(task=1, is_running=True))),
        ("", (MergeStarted(task=0, others=(1,)), InProgress(task=0))),
        ("", (MergeStarted(task=0, others=(1,)), InProgress(task=1))),
    ],
    ids=["a model that is not asked for", "two models at a time", "a pass", "a pass of two turns"],
)
def test_a_process_that_always_says_and_does_the_same_has_an_end(
    why_not: str, events: tuple[Event, ...], shelf: Shelf, adapters: list[AdapterFiles]
) -> None:
    """It may be in the hands of a base's code. The gate's own never says this again."""
    one = one_pass(shelf.base("llama"), adapters[:2])
    left = Job(groups=(replace(one, tasks=tuple(task.without("forward", why_not) for task in one.tasks)),))
    tried, processes, killer = set[tuple[str, object]](), 0, Killer()
    while left.groups[0].tasks:
        attempt, processes = Attempt(left, killer), processes + 1
        with contextlib.suppress(GarbledError):
            for event in (BaseLoading(group=0), *events):
                attempt.receive(event)
        left = attempt.remaining_job(DEATH, tried)
        assert processes < 10
    assert killer.outcomes() == {0: "Unjudged", 1: "Unjudged"}


def test_the_time_of_the_models_does_not_count_as_the_merges(
    shelf: Shelf, adapters: list[AdapterFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("merge_gate.worker.supervisor.time.monotonic", lambda: now[0])
    attempt = begun(Job(groups=(limited(group(shelf.base("llama"), adapters), 0),)), MergeStarted(task=0))
    for is_running, pause_s in ((True, 0.4 * TIMEOUT_S), (False, 0.9 * TIMEOUT_S)):
        attempt.receive(ForwardRunning(task=0, is_running=is_running))
        now[0] += pause_s
        assert not attempt.is_overdue()
    now[0] += 0.2 * TIMEOUT_S
    assert attempt.is_overdue()


def test_each_model_of_a_pass_has_a_time_limit_of_its_own(
    shelf: Shelf, adapters: list[AdapterFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run one after another, or all together: then the first one that exceeds its limit ends all."""
    now = [0.0]
    monkeypatch.setattr("merge_gate.worker.supervisor.time.monotonic", lambda: now[0])
    job = Job(groups=(limited(one_pass(shelf.base("llama"), adapters), 0, 1, 2),))
    attempt = begun(job, MergeStarted(task=0, others=(1, 2)))
    for task in (0, 1, 2):
        for is_running in (True, False):
            attempt.receive(ForwardRunning(task=task, is_running=is_running))
            assert not attempt.is_overdue()
            now[0] += 0.4 * TIMEOUT_S if is_running else 0.0
    attempt.receive(MergeProgressed(task=0, done=1, total=2, module="m"))
    now[0] += 2.9 * TIMEOUT_S
    assert not attempt.is_overdue(), "the merge of the pass has its limit for itself"
    for task in (1, 2):
        attempt.receive(ForwardRunning(task=task, is_running=True))
    now[0] += 0.6 * TIMEOUT_S
    assert attempt.is_overdue()


def test_a_pass_has_the_time_of_its_adapters_together(shelf: Shelf, adapters: list[AdapterFiles]) -> None:
    job = Job(groups=(one_pass(shelf.base("llama"), adapters),))
    attempt = begun(job, MergeStarted(task=0, others=(1, 2)))
    assert attempt._timeout_of_now() == sum(task.timeout_s for task in job.groups[0].tasks)
    attempt.receive(ForwardRunning(task=2, is_running=True))
    assert attempt._timeout_of_now() == job.groups[0].tasks[2].timeout_s / supervisor.FORWARD_SHARE


def test_children_that_die_at_once_are_not_started_forever(
    shelf: Shelf, adapters: list[AdapterFiles], tmp_path: Path, wording: Wording
) -> None:
    killer = Killer()
    with other_workers(tmp_path, "raise SystemExit('no torch here')"), WorkerSlot() as worker:
        supervise(Job(groups=(group(shelf.base("llama"), adapters),)), killer, worker)
    assert killer.outcomes() == dict.fromkeys(range(3), "Unjudged")
    assert "no torch here" in killer.refusal(2).message
    wording(deed(killer.refusal(2)))


def test_a_base_that_could_not_be_loaded_is_not_loading(
    shelf: Shelf, adapters: list[AdapterFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merge_gate.worker.supervisor.FIRST_NOTE_S", 0.0)
    killer = Killer()
    attempt = Attempt(Job(groups=(group(shelf.base("llama"), adapters),)), killer)
    attempt.receive(BaseLoading(group=0))
    attempt.receive(Idle())
    attempt.receive(Unjudged(task=0, refusal=NotJudged(message="m")))
    attempt.receive(Idle())
    assert len([event for event in killer.heard if isinstance(event, Idle)]) == 1


@pytest.mark.slow
def test_an_expression_without_end_is_the_adapters_fault(shelf: Shelf, adapters: list[AdapterFiles]) -> None:
    """Within its time limit: the trial ends, and says which expression it is."""
    adapters[0] = hang(adapters[0])
    killer = Killer()
    with WorkerSlot() as worker:
        supervise(Job(groups=(group(shelf.base("llama"), adapters[:1]),)), killer, worker)
    (merged,) = [event for event in killer.heard if isinstance(event, Merged)]
    refusal = merged.evidence.refusal
    assert isinstance(refusal, Refusal)
    assert (refusal.kind, refusal.fields["pattern"].text) == ("pattern_refused", ENDLESS)
    assert "problem" not in refusal.fields


# --- accounts --------------------------------------------------------------------------------------------------------


def test_an_adapter_that_the_child_forgets_is_unjudged(
    shelf: Shelf, adapters: list[AdapterFiles], wording: Wording
) -> None:
    killer = Killer()
    attempt = Attempt(Job(groups=(group(shelf.base("llama"), adapters),)), killer)
    attempt.receive(Unjudged(task=0, refusal=NotJudged(message="m")))
    attempt.receive(Finished())
    attempt.report_rest()
    assert killer.outcomes() == dict.fromkeys(range(3), "Unjudged")
    wording(killer.refusal(1))


REFUSED = NotJudged(message="m")


@pytest.mark.parametrize(
    "event",
    [
        Unjudged(task=0, refusal=REFUSED),
        Unjudged(task=3, refusal=REFUSED),
        Unjudged(task=7, refusal=REFUSED),
        MergeStarted(task=1, others=(3,)),
        MergeStarted(task=0),
        InProgress(task=3),
        ForwardRunning(task=3, is_running=True),
        BaseLoading(group=2),
        BaseLoading(group=3),
        DeviceChosen(device="cuda", device_name="another"),
    ],
    ids=repr,
)
def test_an_event_about_other_tasks_is_refused(
    event: Event, shelf: Shelf, adapters: list[AdapterFiles], tmp_path: Path
) -> None:
    """Task 0 is reported, tasks 1 and 2 are open, and 3 to 5 are on another base. Group 2 has no tasks."""
    other = shutil.copytree(shelf.base("llama"), tmp_path / "other")
    groups = group(shelf.base("llama"), adapters), group(other, adapters, first=3), group(other, [])
    attempt = begun(Job(groups=groups), Unjudged(task=0, refusal=REFUSED), MergeStarted(task=1))
    with pytest.raises(GarbledError):
        attempt.receive(event)
    left = attempt.remaining_job(DEATH, set())
    assert [task.index for one in left.groups for task in one.tasks] == [2, 3, 4, 5]


def turns(attempt: Attempt) -> dict[int, int]:
    """After a death, whom each task is merged with."""
    return {task.index: task.turn for one in attempt.remaining_job(DEATH, set()).groups for task in one.tasks}


@pytest.mark.parametrize(
    ("events", "suspects"),
    [
        ([InProgress(task=0)], {0}),
        ([InProgress(task=0), InProgress(task=1, thread=11), InProgress(task=2, thread=12)], {1, 2}),
        ([InProgress(task=1, thread=11), InProgress(task=2, thread=12), InProgress(task=0, thread=12)], {0, 1}),
        ([InProgress(task=1, thread=11), InProgress(task=2)], {2}),
    ],
)
def test_after_a_death_in_a_pass_suspects_are_merged_apart(
    events: list[Event], suspects: set[int], shelf: Shelf, adapters: list[AdapterFiles]
) -> None:
    attempt = begun(
        Job(groups=(one_pass(shelf.base("llama"), adapters),)), MergeStarted(task=0, others=(1, 2)), *events
    )
    assert {index for index, turn in turns(attempt).items() if turn == SUSPECTED} == suspects


@dataclass
class SimulatedPasses:
    """A job of adapters that are merged in passes, of which some end the process. `reads` are the passes."""

    job: Job
    culprits: set[int]
    in_progress: int
    most_deaths: int
    reads: list[list[int]] = field(default_factory=list)
    deaths: list[int] = field(default_factory=list)
    merged: set[int] = field(default_factory=set)
    errors: set[int] = field(default_factory=set)

    def listen(self, event: Event) -> None:
        if isinstance(event, Unjudged):
            (self.errors if event.refusal.hint == DEATH.hint else self.merged).add(event.task)

    def run(self) -> None:
        job, tried = self.job, set[tuple[str, object]]()
        while job.groups[0].tasks:
            attempt = Attempt(job, self.listen)
            attempt.receive(BaseLoading(group=0))
            for batch in batches([(task, None) for task in job.groups[0].tasks]):
                if self.dies([task.index for task, _ in batch], attempt):
                    break
            job = attempt.remaining_job(DEATH, tried)

    def dies(self, batch: list[int], attempt: Attempt) -> bool:
        """Read the base once. At the death, the culprit and as many others as there are threads are in progress."""
        self.reads.append(batch)
        attempt.receive(MergeStarted(task=batch[0], others=tuple(batch[1:])))
        guilty = [index for index in batch if index in self.culprits]
        if guilty and len(self.deaths) < self.most_deaths:
            self.deaths.append(len(self.reads))
            for thread, index in enumerate([*dict.fromkeys(guilty + batch)][: self.in_progress]):
                attempt.receive(InProgress(task=index, thread=thread))
            return True
        for index in batch:
            attempt.receive(Unjudged(task=index, refusal=NotJudged(message="merged")))
        return False


TWENTY = 20


def simulated(base: Path, adapter: AdapterFiles, culprits: set[int], in_progress: int, most: int) -> SimulatedPasses:
    simulation = SimulatedPasses(Job(groups=(one_pass(base, [adapter] * TWENTY),)), culprits, in_progress, most)
    simulation.run()
    return simulation


@pytest.mark.parametrize("in_progress", [0, 1, 2, 16])
@pytest.mark.parametrize("culprit", [0, 7, 19])
def test_one_death_costs_at_most_two_more_reads_of_the_base(
    culprit: int, in_progress: int, shelf: Shelf, adapters: list[AdapterFiles]
) -> None:
    """Of 20 adapters, some of which were in progress."""
    done = simulated(shelf.base("llama"), adapters[0], {culprit}, in_progress, most=1)
    assert (done.merged, done.errors) == (set(range(TWENTY)), set())
    after = (TWENTY - in_progress, in_progress) if in_progress else (1, TWENTY - 1)
    assert [len(batch) for batch in done.reads] == [TWENTY, *after]


@pytest.mark.parametrize(
    ("culprits", "in_progress", "reads"),
    [
        ({7}, 0, [20, 1, 19, *[1] * 19]),  # after the second death, each alone
        ({0}, 0, [20, 1, 19]),
        ({7}, 1, [20, 19, 1]),
        ({7}, 2, [20, 18, 2, 1, 1]),
        ({7, 12}, 1, [20, 19, 18, 2, 1, 1]),
    ],
)
def test_an_adapter_that_ends_every_process_costs_its_verdict(
    culprits: set[int], in_progress: int, reads: list[int], shelf: Shelf, adapters: list[AdapterFiles]
) -> None:
    done = simulated(shelf.base("llama"), adapters[0], culprits, in_progress, most=100)
    assert (done.merged, done.errors) == (set(range(TWENTY)) - culprits, culprits)
    assert [len(batch) for batch in done.reads] == reads


def test_a_death_in_a_pass_leaves_the_passes_of_other_groups(shelf: Shelf, adapters: list[AdapterFiles]) -> None:
    groups = one_pass(shelf.base("llama"), adapters[:2]), one_pass(shelf.base("llama"), adapters[2:], first=2)
    attempt = begun(Job(groups=groups), MergeStarted(task=0, others=(1,)))
    assert turns(attempt) == {0: ALONE, 1: TOGETHER, 2: TOGETHER}


def test_a_death_between_two_adapters_costs_none(shelf: Shelf, adapters: list[AdapterFiles]) -> None:
    job = Job(groups=(group(shelf.base("llama"), adapters),))
    attempt = begun(job, MergeStarted(task=0), Unjudged(task=0, refusal=REFUSED))
    assert turns(attempt) == {1: TOGETHER, 2: TOGETHER}


def test_a_death_as_a_pass_hands_over_is_of_the_one_in_progress(shelf: Shelf, adapters: list[AdapterFiles]) -> None:
    job = Job(groups=(one_pass(shelf.base("llama"), adapters),))
    events = MergeStarted(task=0, others=(1, 2)), Unjudged(task=0, refusal=REFUSED), InProgress(task=1)
    assert turns(begun(job, *events)) == {1: SUSPECTED, 2: TOGETHER}
    attempt = begun(job, *events, Unjudged(task=1, refusal=REFUSED))
    assert attempt._timeout_of_now() == job.groups[0].tasks[2].timeout_s


@pytest.mark.parametrize(
    "changes",
    [{"done": "x"}, {"task": []}, {"done": 10**5000}, {"module": 5}, {"total": None}],
    ids=["text", "list", "digits", "number", "none"],
)
def test_an_event_with_fields_of_other_types_is_garbled(
    changes: dict[str, Any], shelf: Shelf, adapters: list[AdapterFiles]
) -> None:
    job = Job(groups=(group(shelf.base("llama"), adapters),))
    attempt = begun(job, MergeStarted(task=0))
    with pytest.raises(GarbledError):
        attempt.receive(replace(MergeProgressed(task=0, done=1, total=2, module="m"), **changes))


def test_a_long_name_of_a_module_is_cut(shelf: Shelf, adapters: list[AdapterFiles]) -> None:
    attempt = begun(Job(groups=(group(shelf.base("llama"), adapters),)), MergeStarted(task=0))
    attempt.receive(MergeProgressed(task=0, done=1, total=2, module="m\x1b" * 1000))
    assert len(attempt._progress) < 1000
    assert attempt._progress.isprintable()


def test_what_the_listener_raises_ends_the_child(shelf: Shelf, adapters: list[AdapterFiles]) -> None:
    class FillStep(BaseException):
        pass

    def listen(event: Event) -> None:
        raise FillStep

    worker = WorkerSlot()
    child = process_of(worker)
    with pytest.raises(FillStep), worker:
        supervise(Job(groups=(group(shelf.base("llama"), adapters),)), listen, worker)
    assert child.poll() == -signal.SIGKILL


def test_a_broken_pipe_of_the_listener_is_not_the_childs(shelf: Shelf, adapters: list[AdapterFiles]) -> None:
    def listen(event: Event) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError), WorkerSlot() as worker:
        supervise(Job(groups=(group(shelf.base("llama"), adapters),)), listen, worker)


def test_a_child_without_a_job_leaves_when_it_is_let_go() -> None:
    with WorkerProcess() as child:
        pid = child._process.pid
        child._channel.close()
        wait_until(lambda: not alive(pid))
        assert child._process.wait() == 0


def test_a_slot_holds_one_process() -> None:
    with WorkerSlot() as worker:
        first = process_of(worker)
        assert process_of(worker) is first
        assert children_of(os.getpid()) == [first.pid]
    assert not children_of(os.getpid())
    assert not worker.is_started


def test_a_process_that_cannot_start_early_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> NoReturn:
        raise OSError("no process to be had")

    monkeypatch.setattr(supervisor, "WorkerProcess", refuse)
    with WorkerSlot() as worker:
        worker.start_early()
        assert not worker.is_started
        with pytest.raises(OSError, match="no process"):
            worker.start()


def test_a_job_without_tasks_starts_nothing(shelf: Shelf) -> None:
    killer = Killer()
    with WorkerSlot() as worker:
        supervise(Job(groups=(group(shelf.base("llama"), []),)), killer, worker)
        assert not worker.is_started
    assert killer.heard == []


# --- the device without a job ----------------------------------------------------------------------------------------


def test_a_process_without_adapters_reports_its_device_and_ends() -> None:
    with WorkerSlot() as worker:
        child = process_of(worker)
        chosen = worker.choose_device("cpu")
        assert isinstance(chosen, DeviceChosen)
        assert chosen.device == "cpu"
        assert child.poll() == 0
        assert not worker.is_started, "the next job gets a new process"


def test_a_process_that_dies_reports_no_device() -> None:
    with WorkerSlot() as worker:
        process_of(worker).kill()
        assert worker.choose_device("cpu") is None
        assert not worker.is_started
