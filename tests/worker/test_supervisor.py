"""The supervisor and its child process: what a death costs, and that nobody outlives anybody.

Most children are played (tests/support/played_worker.py). A real one that must hang at a known place is given a regular
expression that takes ten seconds of trial.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from merge_gate.files.preflight import preflight
from merge_gate.records.files import AdapterFiles, DeclaredQuantization
from merge_gate.records.measured import BaseFacts, Evidence
from merge_gate.records.refusals import NotJudged
from merge_gate.records.terms import BaseKey
from merge_gate.worker.batches import batches
from merge_gate.worker.encoding import GarbledError
from merge_gate.worker.process import WorkerProcess
from merge_gate.worker.protocol import (
    ALONE,
    SUSPECTED,
    TOGETHER,
    BaseLoaded,
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
from merge_gate.worker.supervisor import FIRST_NOTE_S, FORWARD_SHARE, MOST_THREADS, Attempt, WorkerSlot, supervise
from tests.support.command import alive, children_of, wait_until
from tests.support.engine.base_headers import base_files
from tests.support.faults import configure
from tests.support.models import Shelf
from tests.support.played_worker import other_workers, plan, played_workers
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
    tasks = tuple(Task(index=first + n, files=(files,), no_forward="") for n, files in enumerate(adapters))
    return Group(
        base=BaseKey(model=base.name, revision=None, dtype="float32", quantization="none"),
        directory=str(base),
        files=base_files(base),
        tasks=tasks,
    )


@pytest.fixture
def trio(shelf: Shelf, adapters: list[AdapterFiles]) -> Group:
    return group(shelf.base("llama"), adapters)


@pytest.fixture
def job(trio: Group) -> Job:
    """Three adapters that are merged in one pass."""
    return Job(groups=(replace(trio, one_pass=True),))


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


def test_each_accident_costs_only_the_adapters_that_it_hit(deaths: Killer, wording: Wording) -> None:
    """The first child of the job was killed before it had the job, and adapter 2 needed two loads of its base."""
    outcomes = deaths.outcomes()
    assert {task for task, outcome in outcomes.items() if outcome == "Merged"} == {2, 4, 5, 7, 10}
    assert len(outcomes) == 11
    assert [event for event in deaths.heard if event == BaseLoading(group=1)] == [BaseLoading(group=1)] * 3
    assert "SIGKILL" in deaths.refusal(3).message
    wording(deed(deaths.refusal(3)), deed(deaths.refusal(0)), deaths.refusal(6), deaths.refusal(8))


def test_what_takes_long_is_named_meanwhile(deaths: Killer) -> None:
    merging = [event for event in deaths.heard if isinstance(event, Idle) and event.task == 6]
    assert merging, "and on a busy machine others too"
    assert [event.timeout_s for event in merging] == [TIMEOUT_S] * len(merging)
    assert len(merging) <= 3, "each time after twice as long"
    loading = [event for event in deaths.heard if isinstance(event, Idle) and event.base == "stopped"]
    assert {(event.task, event.timeout_s) for event in loading} == {(None, TIMEOUT_S)}


def copied(shelf: Shelf, directory: Path) -> Path:
    """A base of its own, for which accidents can be planned."""
    return shutil.copytree(shelf.base("llama"), directory)


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
    same = {"seconds": 0.0, "cross_checked": ()}
    found, expected = (
        [
            replace(event.evidence, forward=replace(event.evidence.forward, largest_difference=None), **same)
            for event in one.heard
            if isinstance(event, Merged)
        ]
        for one in (killer, alone)
    )
    assert found == expected


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
    assert "SIGKILL" in (why[5] or "")
    assert why[4] is why[6] is None
    assert started(accidents, 4, 5, 6) == [(4, (5, 6)), (4, ()), (5, ()), (5, ()), (6, ())], "then each runs alone"


@pytest.mark.parametrize("passes", [False, True])
def test_a_base_that_hangs_is_not_run_again(passes, shelf, adapters, tmp_path, wording) -> None:
    base = copied(shelf, tmp_path / "base")
    plan(base, run="hang hang")
    killer, one = Killer(), limited((one_pass if passes else group)(base, adapters), 0, 1)
    off = replace(one.tasks[2], no_forward="forward is off")
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
    from merge_gate.engine.forward import model_runs
    def run_adapters(base, models, *others, run=model_runs.run_adapters):
        layers = (layer for model in models for layer in model.modules() if hasattr(layer, "lora_alpha"))
        if any(layer.lora_alpha["default"] == 1 for layer in layers):
            os.kill(os.getpid(), signal.SIGKILL)
        return run(base, models, *others)
    model_runs.run_adapters = run_adapters
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


def begun(job: Job, *events: Event, **clock: Any) -> Attempt:
    """A process that loaded the first base, and then sent these events."""
    attempt = Attempt(job, Killer(), **clock)
    for event in (BaseLoading(group=0), *events):
        attempt.receive(event)
    return attempt


DEATH = NotJudged(message="killed", hint="hint")


def test_a_death_of_models_is_blamed_on_no_merge(job: Job) -> None:
    running = [ForwardRunning(task=task, is_running=True) for task in (0, 1)]
    ended = [replace(event, is_running=False) for event in running]
    merging = MergeStarted(task=0, others=(1, 2))
    assert turns(begun(job, merging, *running)) == {0: ALONE, 1: ALONE, 2: TOGETHER}
    assert turns(begun(job, merging, *running, *ended, InProgress(task=2))) == {0: TOGETHER, 1: TOGETHER, 2: SUSPECTED}
    left = begun(job, merging, *running, *ended, running[1]).remaining_job(DEATH, set())
    assert [bool(task.no_forward) for task in left.groups[0].tasks] == [False, True, False]
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
def test_a_process_that_always_says_and_does_the_same_has_an_end(why_not, events, trio) -> None:
    """It may be in the hands of a base's code. The gate's own never says this again."""
    tasks = tuple(replace(task, no_forward=why_not) for task in trio.tasks[:2])
    left = Job(groups=(replace(trio, tasks=tasks, one_pass=True),))
    tried, processes, killer = set[tuple[str, object]](), 0, Killer()
    while left.groups[0].tasks:
        attempt, processes = Attempt(left, killer), processes + 1
        with contextlib.suppress(GarbledError):
            for event in (BaseLoading(group=0), *events):
                attempt.receive(event)
        left = attempt.remaining_job(DEATH, tried)
        assert processes < 10
    assert killer.outcomes() == {0: "Unjudged", 1: "Unjudged"}


def test_the_time_of_the_models_does_not_count_as_the_merges(trio: Group) -> None:
    clock = [0.0]
    attempt = begun(Job(groups=(limited(trio, 0),)), MergeStarted(task=0), clock=lambda: clock[0])
    for is_running, pause_s in ((True, 0.4 * TIMEOUT_S), (False, 0.9 * TIMEOUT_S)):
        attempt.receive(ForwardRunning(task=0, is_running=is_running))
        clock[0] += pause_s
        assert not attempt.is_overdue()
    clock[0] += 0.2 * TIMEOUT_S
    assert attempt.is_overdue()


def test_each_model_of_a_pass_has_a_time_limit_of_its_own(job: Job) -> None:
    """They run one after another, or all together: then the first one that exceeds its limit ends all."""
    clock, limited_job = [0.0], Job(groups=(limited(job.groups[0], 0, 1, 2),))
    attempt = begun(limited_job, MergeStarted(task=0, others=(1, 2)), clock=lambda: clock[0])
    for task in (0, 1, 2):
        for is_running in (True, False):
            attempt.receive(ForwardRunning(task=task, is_running=is_running))
            assert not attempt.is_overdue()
            clock[0] += 0.4 * TIMEOUT_S if is_running else 0.0
    attempt.receive(MergeProgressed(task=0, done=1, total=2, module="m"))
    clock[0] += 2.9 * TIMEOUT_S
    assert not attempt.is_overdue(), "the merge of the pass has its limit for itself"
    for task in (1, 2):
        attempt.receive(ForwardRunning(task=task, is_running=True))
    clock[0] += 0.6 * TIMEOUT_S
    assert attempt.is_overdue()


def test_a_pass_has_the_time_of_its_adapters_together(job: Job) -> None:
    attempt = begun(job, MergeStarted(task=0, others=(1, 2)))
    assert attempt._timeout_of_now() == sum(task.timeout_s for task in job.groups[0].tasks)
    attempt.receive(ForwardRunning(task=2, is_running=True))
    assert attempt._timeout_of_now() == job.groups[0].tasks[2].timeout_s / FORWARD_SHARE


def test_children_that_die_at_once_are_not_started_forever(trio: Group, tmp_path: Path, wording: Wording) -> None:
    killer = Killer()
    with other_workers(tmp_path, "raise SystemExit('no torch here')"), WorkerSlot() as worker:
        supervise(Job(groups=(trio,)), killer, worker)
    assert killer.outcomes() == dict.fromkeys(range(3), "Unjudged")
    assert "no torch here" in killer.refusal(2).message
    wording(deed(killer.refusal(2)))


def test_a_base_that_could_not_be_loaded_is_not_loading(trio: Group) -> None:
    killer, clock = Killer(), itertools.count(step=FIRST_NOTE_S + 1)
    attempt = Attempt(Job(groups=(trio,)), killer, clock=lambda: next(clock))
    attempt.receive(BaseLoading(group=0))
    attempt.receive(Idle())
    attempt.receive(Unjudged(task=0, refusal=NotJudged(message="m")))
    attempt.receive(Idle())
    assert len([event for event in killer.heard if isinstance(event, Idle)]) == 1


# --- accounts --------------------------------------------------------------------------------------------------------


def test_an_adapter_that_the_child_forgets_is_unjudged(trio: Group, wording: Wording) -> None:
    killer = Killer()
    attempt = Attempt(Job(groups=(trio,)), killer)
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
def test_an_event_about_other_tasks_is_refused(event, trio, adapters, tmp_path) -> None:
    """Task 0 is reported, tasks 1 and 2 are open, and 3 to 5 are on another base. Group 2 has no tasks."""
    other = shutil.copytree(trio.directory, tmp_path / "other")
    groups = trio, group(other, adapters, first=3), group(other, [])
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
def test_after_a_death_in_a_pass_suspects_are_merged_apart(events: list[Event], suspects: set[int], job: Job) -> None:
    attempt = begun(job, MergeStarted(task=0, others=(1, 2)), *events)
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


def simulated(trio: Group, culprits: set[int], in_progress: int, most: int) -> SimulatedPasses:
    tasks = tuple(replace(trio.tasks[0], index=index) for index in range(TWENTY))
    simulation = SimulatedPasses(Job(groups=(replace(trio, tasks=tasks, one_pass=True),)), culprits, in_progress, most)
    simulation.run()
    return simulation


@pytest.mark.parametrize("in_progress", [0, 1, 2, 16])
@pytest.mark.parametrize("culprit", [0, 7, 19])
def test_one_death_costs_at_most_two_more_reads_of_the_base(culprit: int, in_progress: int, trio: Group) -> None:
    """Of 20 adapters, some of which were in progress."""
    done = simulated(trio, {culprit}, in_progress, most=1)
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
def test_an_adapter_that_ends_every_process_costs_its_verdict(culprits, in_progress, reads, trio) -> None:
    done = simulated(trio, culprits, in_progress, most=100)
    assert (done.merged, done.errors) == (set(range(TWENTY)) - culprits, culprits)
    assert [len(batch) for batch in done.reads] == reads


def test_a_death_leaves_what_it_did_not_touch(trio: Group, adapters: list[AdapterFiles], job: Job) -> None:
    """The pass of another group, and adapters that are merged one after another."""
    other = one_pass(Path(trio.directory), adapters[:2], first=3)
    two = Job(groups=(*job.groups, other))
    assert turns(begun(two, MergeStarted(task=0, others=(1, 2)))) == {0: ALONE} | dict.fromkeys(range(1, 5), TOGETHER)
    done = Unjudged(task=0, refusal=REFUSED)
    assert turns(begun(Job(groups=(trio,)), MergeStarted(task=0), done)) == {1: TOGETHER, 2: TOGETHER}


def test_a_death_as_a_pass_hands_over_is_of_the_one_in_progress(job: Job) -> None:
    events = MergeStarted(task=0, others=(1, 2)), Unjudged(task=0, refusal=REFUSED), InProgress(task=1)
    assert turns(begun(job, *events)) == {1: SUSPECTED, 2: TOGETHER}
    attempt = begun(job, *events, Unjudged(task=1, refusal=REFUSED))
    assert attempt._timeout_of_now() == job.groups[0].tasks[2].timeout_s


@pytest.mark.parametrize(
    "changes",
    [{"done": "x"}, {"task": []}, {"done": 10**5000}, {"module": 5}, {"total": None}],
    ids=["text", "list", "digits", "number", "none"],
)
def test_an_event_with_fields_of_other_types_is_garbled(changes: dict[str, Any], trio: Group) -> None:
    attempt = begun(Job(groups=(trio,)), MergeStarted(task=0))
    with pytest.raises(GarbledError):
        attempt.receive(replace(MergeProgressed(task=0, done=1, total=2, module="m"), **changes))


def test_a_long_name_of_a_module_is_cut(trio: Group) -> None:
    attempt = begun(Job(groups=(trio,)), MergeStarted(task=0))
    attempt.receive(MergeProgressed(task=0, done=1, total=2, module="m\x1b" * 1000))
    assert len(attempt._progress) < 1000
    assert attempt._progress.isprintable()


class FillStep(BaseException):
    pass


@pytest.mark.parametrize("raised", [FillStep, BrokenPipeError])
def test_what_the_listener_raises_ends_the_child(raised: type[BaseException], trio: Group) -> None:
    """A broken pipe of the listener is not the child's."""

    def listen(event: Event) -> None:
        raise raised

    worker = WorkerSlot()
    child = process_of(worker)
    with pytest.raises(raised), worker:
        supervise(Job(groups=(trio,)), listen, worker)
    assert child.poll() == -signal.SIGKILL


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


def test_a_job_without_tasks_starts_nothing(shelf: Shelf) -> None:
    killer = Killer()
    with WorkerSlot() as worker:
        supervise(Job(groups=(group(shelf.base("llama"), []),)), killer, worker)
        assert not worker.is_started
    assert killer.heard == []


# --- the device without a job ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_process_without_adapters_reports_its_device_and_ends(is_killed: bool) -> None:
    with WorkerSlot() as worker:
        child = process_of(worker)
        if is_killed:
            child.kill()
        chosen = worker.choose_device("cpu")
        assert (chosen is None) == is_killed
        assert chosen is None or (chosen.device, child.poll()) == ("cpu", 0)
        assert not worker.is_started, "the next job gets a new process"


# --- one base, as the job asks for it, within one limit --------------------------------------------------------------


def facts_of(group: Group, **changes: Any) -> BaseFacts:
    key = group.base
    return replace(BaseFacts(model=key.model, revision=None, dtype="float32", quantization="none"), **changes)


def merged(group: Group, **changes: Any) -> Merged:
    return Merged(task=0, evidence=Evidence(base=facts_of(group, **changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "another"},
        {"revision": "abc"},
        {"dtype": "float16"},
        {"quantization": "bnb-4bit"},
        {"dtype": "float16", "dtypes": (("float16", 1), ("bfloat16", 1))},
    ],
    ids=str,
)
def test_evidence_on_another_base_is_refused(changes: dict[str, Any], trio: Group) -> None:
    attempt = begun(Job(groups=(trio,)), MergeStarted(task=0))
    with pytest.raises(GarbledError):
        attempt.receive(merged(trio, **changes))
    assert attempt.remaining_job(DEATH, set()).groups[0].tasks == trio.tasks[1:]


def test_a_class_may_keep_most_parameters_in_another_dtype(trio: Group) -> None:
    group = replace(trio, base=replace(trio.base, dtype="float16"))
    dtypes = ("float32", 3), ("float16", 1)
    begun(Job(groups=(group,)), MergeStarted(task=0)).receive(merged(group, dtypes=dtypes))


def with_files(group: Group, **changes: Any) -> Group:
    return replace(group, base=replace(group.base, dtype="auto"), files=replace(group.files, **changes))


FP8 = DeclaredQuantization(method="fp8", file="config.json")


@pytest.mark.parametrize(
    ("files", "facts", "is_allowed"),
    [
        ({}, {}, True),
        ({}, {"dtype": "bfloat16"}, False),
        ({"config_dtypes": ("bfloat16",)}, {"dtype": "bfloat16"}, True),
        ({"tensors": ()}, {"dtype": "bfloat16"}, True),
        ({}, {"quantization": "fp8"}, False),
        ({"quantization": FP8}, {"quantization": "fp8", "dtype": "bfloat16"}, True),
        ({"quantization": FP8}, {"quantization": "none"}, True),
        ({"quantization": FP8}, {"quantization": "bnb-4bit"}, False),
        ({"quantization": replace(FP8, method="bitsandbytes_4bit")}, {"quantization": "bnb-4bit"}, True),
    ],
)
def test_what_the_job_leaves_open_must_fit_the_files(files, facts, is_allowed, trio) -> None:
    group = with_files(trio, **files)
    assert group.allows(facts_of(group, **facts)) == is_allowed


def test_the_first_event_on_a_base_fixes_its_dtype(trio: Group) -> None:
    group = with_files(trio, config_dtypes=("bfloat16",))
    attempt = begun(Job(groups=(group,)), BaseLoaded(group=0, task=0, facts=facts_of(group), seconds=0.0))
    with pytest.raises(GarbledError):
        attempt.receive(merged(group, dtype="bfloat16"))
    attempt.receive(merged(group))


def overdue_after(attempt: Attempt, clock: list[float], events: list[Event]) -> float:
    """How long a process may send these events again and again, each half of a time limit after the last."""
    for event in itertools.cycle(events):
        with contextlib.suppress(GarbledError):
            attempt.receive(event)
        clock[0] += 0.5 * TIMEOUT_S
        if attempt.is_overdue():
            return clock[0]
    raise AssertionError


@pytest.mark.parametrize(
    "events",
    [
        [BaseLoading(group=0)],
        [MergeStarted(task=0)],
        [ForwardRunning(task=0, is_running=True), ForwardRunning(task=0, is_running=False)],
        [BaseLoading(group=0), BaseLoading(group=1)],
    ],
    ids=["load", "merge", "model", "two bases"],
)
def test_no_event_moves_the_limit_of_a_base(events: list[Event], trio: Group, tmp_path: Path) -> None:
    clock = [0.0]
    first = replace(limited(trio, 0), tasks=limited(trio, 0).tasks[:1])
    second = replace(first, directory=str(tmp_path), tasks=(replace(first.tasks[0], index=1),))
    attempt = begun(Job(groups=(first, second)), MergeStarted(task=0), clock=lambda: clock[0])
    assert overdue_after(attempt, clock, events) <= 2 * 3 * TIMEOUT_S


@pytest.mark.parametrize("event", [BaseLoading(group=0), MergeStarted(task=1)], ids=["load", "merge"])
def test_what_is_shown_comes_twice_for_each_adapter_at_most(event: Event, trio: Group) -> None:
    attempt = Attempt(Job(groups=(trio,)), Killer())
    attempt.receive(BaseLoading(group=0))
    for _ in range(6 - isinstance(event, BaseLoading)):
        attempt.receive(event)
    with pytest.raises(GarbledError, match=f"more than 6 of {type(event).__name__}"):
        attempt.receive(event)


def test_the_threads_of_a_pass_are_bounded(job: Job) -> None:
    """The latest ones count."""
    attempt = begun(job, MergeStarted(task=0, others=(1, 2)))
    for thread in range(10 * MOST_THREADS):
        attempt.receive(InProgress(task=int(thread >= MOST_THREADS), thread=thread))
    assert len(attempt._in_progress) == MOST_THREADS
    assert turns(attempt) == {0: TOGETHER, 1: SUSPECTED, 2: TOGETHER}


def test_a_base_may_be_loaded_as_a_class_for_each_adapter(trio: Group) -> None:
    clock = [0.0]
    attempt = Attempt(Job(groups=(limited(trio, 0, 1, 2),)), Killer(), clock=lambda: clock[0])
    for _ in trio.tasks:
        attempt.receive(BaseLoading(group=0))
        clock[0] += 0.9 * TIMEOUT_S
        assert not attempt.is_overdue()


def test_an_exception_over_an_event_costs_the_base_that_sent_it(trio: Group) -> None:
    heard: list[Event] = []

    def listen(event: Event) -> None:
        heard.append(event)
        if isinstance(event, Merged):
            raise LookupError("no such module")  # noqa: TRY004 - what comes of a figure without meaning

    attempt = Attempt(Job(groups=(trio,)), listen)
    for event in (BaseLoading(group=0), MergeStarted(task=0)):
        attempt.receive(event)
    with pytest.raises(GarbledError, match="no such module"):
        attempt.receive(merged(trio))
    left = attempt.remaining_job(DEATH, set())
    assert [task.index for task in left.groups[0].tasks] == [1, 2]
    assert isinstance(heard[-1], Unjudged)


def test_a_task_that_cannot_be_sent_is_unjudged_at_once(trio: Group, tmp_path: Path) -> None:
    """And the others are merged."""
    huge = replace(trio.tasks[1], files=(replace(trio.tasks[1].files[0], padding=frozenset({10**5000})),))
    killer = Killer()
    with played_workers(tmp_path), WorkerSlot() as worker:
        supervise(Job(groups=(replace(trio, tasks=(trio.tasks[0], huge)),)), killer, worker)
    assert killer.outcomes() == {0: "Merged", 1: "Unjudged"}
    assert "cannot get it" in killer.refusal(1).message
