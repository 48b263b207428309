"""A job on a cluster, without Ray: how it is cut, what a loss costs, and what a node does that sees other files."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import re
import shutil
import threading
from collections import deque
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from merge_gate.cache.key import versions_digest
from merge_gate.errors import GateError
from merge_gate.files import identity
from merge_gate.files.base_watch import BaseWatch
from merge_gate.files.identity import base_identity
from merge_gate.files.preflight import preflight
from merge_gate.files.resolve import base_weight_files, digest_directory
from merge_gate.on_ray import job as job_module
from merge_gate.on_ray import ray_cluster, ray_task
from merge_gate.on_ray.job import judge_on_ray, run_on
from merge_gate.on_ray.ray_cluster import LostError, Resources
from merge_gate.on_ray.ray_task import MAX_BATCH, Expected, RayPart, run_part
from merge_gate.records.files import BaseFiles
from merge_gate.records.measured import BaseFacts
from merge_gate.records.refusals import NotJudged
from merge_gate.records.terms import BaseKey, Quantization
from merge_gate.worker.protocol import (
    BaseLoaded,
    BaseLoading,
    Event,
    Finished,
    Group,
    Idle,
    Job,
    Merged,
    MergeProgressed,
    MergeStarted,
    Task,
    Undecided,
)
from tests.support.engine.base_headers import base_files
from tests.support.faults import poison
from tests.support.wording import Wording

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.models import Shelf

GIB = 1 << 30
DONE = NotJudged(message="done")


def job(*groups: int, device: str = "auto") -> Job:
    """Groups of so many tasks each; nothing lies on disk."""
    first, made = 0, []
    for number, tasks in enumerate(groups):
        made.append(
            Group(
                base=BaseKey(model=f"base{number}", revision=None, dtype="float32", quantization="none"),
                directory=f"/nowhere/{number}",
                files=BaseFiles(directory=f"/nowhere/{number}"),
                tasks=tuple(Task(index=first + index, files=()) for index in range(tasks)),
            )
        )
        first += tasks
    return Job(groups=tuple(made), device=device)


class Scripted:
    """A cluster on which each part says what `says` makes of it; an exception is a loss."""

    def __init__(self, says: Callable[[int, list[int]], list[Any]], *nodes: Resources) -> None:
        self._says, self._nodes = says, nodes or (Resources(node="a", cpus=1, gpus=0, memory_bytes=8 * GIB),)
        self.parts: list[tuple[list[int], Resources]] = []
        self.whole: list[RayPart] = []
        self.cancelled: list[Any] = []
        self._waiting: dict[int, deque[Any]] = {}

    def nodes(self) -> tuple[Resources, ...]:
        return self._nodes

    def submit(self, part: RayPart, needs: Resources) -> int:
        tasks = [task.index for group in part.job.groups for task in group.tasks]
        self.parts.append((tasks, needs))
        self.whole.append(part)
        number = len(self.parts)
        self._waiting[number] = deque(self._says(number, tasks))
        return number

    def ready(self, running: list[int], _patience_s: float) -> list[int]:
        return running[:1]

    def events(self, running: int) -> list[Event] | None:
        waiting = self._waiting[running]
        said = waiting.popleft() if waiting else None
        if isinstance(said, Exception):
            raise said
        return said  # type: ignore[no-any-return]

    def cancel(self, running: Any) -> None:
        self.cancelled.append(running)


def settled(task: int) -> list[Event]:
    return [BaseLoading(group=0), MergeStarted(task=task), Undecided(task=task, refusal=DONE)]


def heard(cluster: Scripted, what: Job) -> dict[int, list[str]]:
    """What was said of each task."""
    said: dict[int, list[str]] = {}
    events: list[Event] = []
    run_on(cluster, what, events.append, None)  # type: ignore[arg-type]
    assert isinstance(events[-1], Finished)
    for event in events:
        if isinstance(event, Undecided):
            assert isinstance(event.refusal, NotJudged)
            said.setdefault(event.task, []).append(event.refusal.message)
    return said


# --- the cut ---------------------------------------------------------------------------------------------------------


def needs(what: Job, *nodes: Resources) -> list[tuple[list[int], Resources]]:
    cluster = Scripted(lambda _, tasks: [settled(task) for task in tasks], *nodes)
    assert set(heard(cluster, what)) == {task.index for group in what.groups for task in group.tasks}
    return cluster.parts


def test_each_base_is_kept_on_one_node_and_each_node_has_two_workers() -> None:
    nodes = [Resources(node=name, cpus=8, gpus=0, memory_bytes=64 * GIB) for name in "ab"]
    parts = needs(job(6, 6), *nodes)
    assert [(one.node, one.cpus, one.gpus) for _, one in parts] == [("a", 4, 0), ("a", 4, 0), ("b", 4, 0), ("b", 4, 0)]
    for node, tasks in (("a", set(range(6))), ("b", set(range(6, 12)))):
        assert {index for part, one in parts if one.node == node for index in part} == tasks


def test_each_gpu_of_a_machine_has_a_worker_and_nothing_runs_beside_them() -> None:
    nodes = [
        Resources(node="cpu", cpus=64, gpus=0, memory_bytes=64 * GIB),
        Resources(node="gpu", cpus=16, gpus=4, memory_bytes=GIB),
    ]
    parts = needs(job(8), *nodes)
    assert [(one.node, one.cpus, one.gpus, len(tasks)) for tasks, one in parts] == [("gpu", 4, 1, 2)] * 4
    assert {one.gpus for _, one in needs(job(8, device="cpu"), *nodes)} == {0}


def test_no_worker_asks_for_more_than_its_node_has() -> None:
    (_, first), (_, second) = needs(job(4), Resources(node="a", cpus=2, gpus=0, memory_bytes=GIB))
    assert first.memory_bytes + second.memory_bytes <= GIB
    assert first.cpus + second.cpus <= 2


def test_a_cluster_without_a_processor_is_said(wording: Wording) -> None:
    cluster = Scripted(lambda *_: [])
    cluster._nodes = ()
    with pytest.raises(GateError) as raised:
        heard(cluster, job(1))
    wording(raised.value)


def test_there_are_no_more_workers_than_tasks() -> None:
    assert [tasks for tasks, _ in needs(job(1), Resources(node="a", cpus=8, gpus=0, memory_bytes=64 * GIB))] == [[0]]


def test_a_base_on_a_mount_that_does_not_answer_holds_up_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    for module in (job_module, identity):
        monkeypatch.setattr(module, "base_identity", lambda _: never.wait())
        monkeypatch.setattr(module, "ANSWER_LIMIT_S", 0.05)
    cluster = Scripted(lambda _, tasks: [settled(task) for task in tasks])
    assert heard(cluster, job(2)) == {0: ["done"], 1: ["done"]}
    assert {base.identity for part in cluster.whole for base in part.bases} == {()}
    never.set()


class Watch(BaseWatch):
    """Has the digests of bases once someone has waited for them."""

    def __init__(self) -> None:
        super().__init__()
        self.waited = 0

    def wait(self) -> None:
        self.waited += 1

    def digest(self, directory: str) -> str | None:
        assert self.waited
        return f"digest of {directory}"


@pytest.mark.parametrize(
    ("address", "digests"),
    [(ray_cluster.LOCAL, [None, None]), ("head:6379", ["digest of /nowhere/0", "digest of /nowhere/1"])],
)
def test_only_other_machines_wait_for_the_digests_of_bases(
    address: str, digests: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this machine the identity of its files tells a base."""
    cluster = Scripted(lambda _, tasks: [settled(task) for task in tasks])
    asked: list[str] = []

    def connect(where: str) -> contextlib.AbstractContextManager[Scripted]:
        asked.append(where)
        return contextlib.nullcontext(cluster)

    monkeypatch.setattr(ray_cluster, "cluster", connect)
    events: list[Event] = []
    judge_on_ray(address, job(1, 1), events.append, Watch())
    assert asked == [address]
    assert [base.sha256 for base in cluster.whole[0].bases] == digests
    assert sum(isinstance(event, Undecided) for event in events) == 2


# --- losses ----------------------------------------------------------------------------------------------------------

LOST = LostError("WorkerCrashedError: it died")


def test_what_was_judged_is_not_judged_again() -> None:
    cluster = Scripted(lambda number, tasks: [settled(tasks[0]), [MergeStarted(task=tasks[1])], LOST] if number == 1
                       else [settled(task) for task in tasks])  # fmt: skip
    assert heard(cluster, job(3)) == {0: ["done"], 1: ["done"], 2: ["done"]}
    assert [tasks for tasks, _ in cluster.parts] == [[0, 1, 2], [1, 2]]


def test_an_adapter_that_was_under_way_twice_is_to_blame_and_no_other(wording: Wording) -> None:
    cluster = Scripted(lambda _, tasks: [[MergeStarted(task=1)], LOST] if 1 in tasks
                       else [settled(task) for task in tasks])  # fmt: skip
    said = heard(cluster, job(3))
    assert said[0] == said[2] == ["done"]
    assert len(said[1]) == 1
    wording(said[1][0])


def test_a_worker_that_is_always_lost_ends_with_a_sentence_for_each(wording: Wording) -> None:
    cluster = Scripted(lambda *_: [LOST])
    said = heard(cluster, job(2))
    assert len(cluster.parts) == 3
    for (sentence,) in said.values():
        wording(sentence)


def test_a_part_that_ends_too_early_leaves_no_adapter_without_a_word(wording: Wording) -> None:
    said = heard(Scripted(lambda _, tasks: [settled(tasks[0])]), job(2))
    assert said[0] == ["done"]
    wording(said[1][0])


def test_a_node_that_is_gone_is_replaced_or_missed(wording: Wording) -> None:
    nodes = [Resources(node=name, cpus=1, gpus=0, memory_bytes=GIB) for name in "ab"]
    cluster = Scripted(lambda _, tasks: [settled(task) for task in tasks], *nodes)

    def says(number: int, tasks: list[int]) -> list[Any]:
        if number > 2:
            return [settled(task) for task in tasks]
        cluster._nodes = (nodes[1],)
        return [LOST] if number == 1 else [settled(task) for task in tasks]

    cluster._says = says
    assert set(heard(cluster, job(2, 2))) == {0, 1, 2, 3}
    assert [one.node for _, one in cluster.parts] == ["a", "b", "b"]

    def gone(_: int, __: list[int]) -> list[Any]:
        cluster._nodes = ()
        return [LOST]

    cluster._nodes, cluster._says = (nodes[0],), gone
    for (sentence,) in heard(cluster, job(2)).values():
        wording(sentence)


def test_whatever_ends_the_run_ends_the_tasks() -> None:
    cluster = Scripted(lambda _, tasks: [settled(task) for task in tasks])

    def stop(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_on(cluster, job(2), stop, None)  # type: ignore[arg-type]
    assert cluster.cancelled == [1]


def test_a_silent_cluster_is_heard_as_idle() -> None:
    cluster = Scripted(lambda _, tasks: [settled(task) for task in tasks])
    silences, events = [[], []], []
    really = cluster.ready
    cluster.ready = lambda running, s: silences.pop() if silences else really(running, s)  # type: ignore[method-assign]
    run_on(cluster, job(1), events.append, None)  # type: ignore[arg-type]
    assert sum(isinstance(event, Idle) for event in events) == 2


# --- on a node -------------------------------------------------------------------------------------------------------


@pytest.fixture
def part(shelf: Shelf, tmp_path: Path) -> RayPart:
    """One adapter on a base of its own."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(shelf.base("llama"), base)
    shutil.copytree(shelf.adapter("plain"), adapter)
    files = preflight(str(adapter), allow_pickle=False)
    group = Group(
        base=BaseKey(model="./base", revision=None, dtype="float32", quantization="none"),
        directory=str(base),
        files=base_files(base),
        tasks=(Task(index=7, files=(files,)),),
    )
    digest = digest_directory(str(base), base_weight_files(str(base)))
    expected = Expected(identity=base_identity(str(base)), sha256=digest)
    return RayPart(job=Job(groups=(group,), device="cpu"), bases=(expected,), versions_sha256=versions_digest())


def events_of(part: RayPart) -> list[Event]:
    return [event for batch in run_part(part) for event in batch]


def moved(part: RayPart) -> RayPart:
    """The run has seen the same files on another machine: their identities there are others."""
    (group,) = part.job.groups
    (files,) = group.tasks[0].files
    there = tuple(replace(one, identity=replace(one.identity, device=99)) for one in files.files)
    task = replace(group.tasks[0], files=(replace(files, files=there),))
    base = replace(part.bases[0], identity=tuple(replace(one, device=99) for one in part.bases[0].identity))
    return replace(part, job=replace(part.job, groups=(replace(group, tasks=(task,)),)), bases=(base,))


def test_the_same_bytes_on_another_machine_are_judged(part: RayPart) -> None:
    there = moved(part)
    events = events_of(there)
    assert sum(isinstance(event, Merged) for event in events) == 1
    (loaded,) = (event for event in events if isinstance(event, BaseLoaded))
    assert loaded.identity == there.bases[0].identity, "the run compares it with what it saw itself"
    assert not any(isinstance(event, Finished) for event in events)


def refused(part: RayPart) -> str:
    (event,) = events_of(part)
    assert isinstance(event, Undecided)
    assert event.task == 7
    assert not any(isinstance(one, BaseLoading) for one in events_of(part))
    assert isinstance(event.refusal, NotJudged)
    return event.refusal.message.replace(os.uname().nodename, "<node>")


def test_other_bytes_on_a_node_are_an_error(part: RayPart, wording: Wording) -> None:
    (group,) = part.job.groups
    poison("lora_B")(Path(group.tasks[0].files[0].directory))
    wording(re.sub("[0-9a-f]{64}", "<digest>", refused(part)))
    Path(group.tasks[0].files[0].directory, "adapter_model.safetensors").unlink()
    wording(refused(part))


def test_another_base_on_a_node_is_an_error(part: RayPart, wording: Wording) -> None:
    there = moved(part)
    for digest in ("0" * 64, None):
        said = refused(replace(there, bases=(replace(there.bases[0], sha256=digest),)))
        wording(re.sub("[0-9a-f]{64}", "<digest>", said))
    shutil.rmtree(part.job.groups[0].directory)
    wording(refused(part))


def test_other_versions_on_a_node_are_an_error(part: RayPart, wording: Wording) -> None:
    wording(refused(replace(part, versions_sha256="0" * 64)))


def test_a_base_that_nobody_could_hash_is_an_error(part: RayPart, wording: Wording) -> None:
    there = moved(part)
    Path(part.job.groups[0].directory, "model.safetensors").unlink()
    wording(refused(there).partition(": ")[0])


# --- what a node says ------------------------------------------------------------------------------------------------


def queued(*said: Event | BaseException | None) -> queue.SimpleQueue[Event | BaseException | None]:
    events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()
    for one in said:
        events.put(one)
    return events


def progressed(done: int) -> Event:
    return MergeProgressed(task=7, done=done, total=99, module="m")


def test_events_travel_together_and_progress_that_is_overtaken_does_not() -> None:
    started, done = MergeStarted(task=7), Undecided(task=7, refusal=DONE)
    said = (started, progressed(1), progressed(2), progressed(3), done, started, progressed(1), None)
    assert [*ray_task._batches(queued(*said))] == [[started, progressed(3), done, started, progressed(1)]]


def test_no_message_holds_more_than_a_few_events() -> None:
    said = [MergeStarted(task=index) for index in range(2 * MAX_BATCH + 1)]
    batches = [*ray_task._batches(queued(*said, None))]
    assert [event for batch in batches for event in batch] == said
    assert [len(batch) for batch in batches] == [MAX_BATCH, MAX_BATCH, 1]
    assert [*ray_task._batches(queued(None))] == []


def supervised(monkeypatch: pytest.MonkeyPatch, part: RayPart, then: Callable[[], None]) -> Iterator[list[Event]]:
    """What a node says whose worker loads the base and judges the adapter, before something else happens."""
    facts = BaseFacts(model="./base", revision=None, dtype="float32", quantization=Quantization.NONE)
    identity = base_identity(part.job.groups[0].directory)

    def supervise(job: Job, listen: Callable[[Event], None], _: object) -> None:
        listen(BaseLoaded(group=0, task=7, facts=facts, identity=identity, seconds=0.1))
        listen(Idle())
        for event in settled(job.groups[0].tasks[0].index):
            listen(event)
        then()
        listen(Finished())

    monkeypatch.setattr(ray_task, "supervise", supervise)
    return run_part(part)


def test_a_base_that_changes_on_a_node_while_it_is_used_takes_its_verdicts_along(
    part: RayPart, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = moved(part)

    def identities(then: Callable[[], None]) -> list[Any]:
        events = [event for batch in supervised(monkeypatch, there, then) for event in batch]
        assert sum(isinstance(event, Undecided) for event in events) == 1
        assert not any(isinstance(event, Idle | Finished) for event in events)
        return [event.identity for event in events if isinstance(event, BaseLoaded)]

    as_the_run_saw_it = there.bases[0].identity
    weights = Path(part.job.groups[0].directory, "model.safetensors")
    assert identities(lambda: None) == [as_the_run_saw_it]
    assert identities(lambda: os.utime(weights, ns=(1, 1))) == [as_the_run_saw_it, ()]


def test_whatever_ends_a_nodes_supervisor_is_raised_where_the_run_hears_it(
    part: RayPart, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    heard: list[Event] = []
    with pytest.raises(OSError, match="No space left"):
        heard.extend(chain.from_iterable(supervised(monkeypatch, part, fail)))
    assert any(isinstance(event, Undecided) for event in heard), "what was judged before is heard before"
