"""A job on a cluster, without Ray: how it is cut, what a loss costs, and what a node does that sees other files."""

from __future__ import annotations

import shutil
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from merge_gate.engine.protocol import (
    BaseLoaded,
    BaseLoading,
    Event,
    Finished,
    Group,
    Idle,
    Job,
    Merged,
    MergeStarted,
    Task,
    Undecided,
)
from merge_gate.errors import GateError
from merge_gate.fleet.on_ray import run_on
from merge_gate.fleet.ray_cluster import LostError, Needs, Node
from merge_gate.fleet.ray_task import Expected, Part, run_part, versions
from merge_gate.identity import base_identity
from merge_gate.records.measured import Refusal
from merge_gate.sources.preflight import preflight
from merge_gate.sources.resolve import base_weight_files, digest_directory
from tests.faults import poison

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.models import Shelf

GIB = 1 << 30
DONE = Refusal(check=None, message="done")


def job(*groups: int, device: str = "auto") -> Job:
    """Groups of so many tasks each; nothing lies on disk."""
    first, made = 0, []
    for number, tasks in enumerate(groups):
        made.append(
            Group(
                label=f"base{number}",
                directory=f"/nowhere/{number}",
                dtype="float32",
                tasks=tuple(Task(index=first + index, files=()) for index in range(tasks)),
            )
        )
        first += tasks
    return Job(groups=tuple(made), device=device)


class Scripted:
    """A cluster on which each part says what `says` makes of it; an exception is a loss."""

    def __init__(self, says: Callable[[int, list[int]], list[Any]], *nodes: Node) -> None:
        self._says, self._nodes = says, nodes or (Node(id="a", cpus=1, gpus=0, memory_bytes=8 * GIB),)
        self.parts: list[tuple[list[int], Needs]] = []
        self.cancelled: list[Any] = []
        self._waiting: dict[int, deque[Any]] = {}

    def nodes(self) -> tuple[Node, ...]:
        return self._nodes

    def submit(self, part: Part, needs: Needs) -> int:
        tasks = [task.index for group in part.job.groups for task in group.tasks]
        self.parts.append((tasks, needs))
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
    return [MergeStarted(task=task), Undecided(task=task, refusal=DONE)]


def heard(cluster: Scripted, what: Job) -> dict[int, list[str]]:
    """What was said of each task."""
    said: dict[int, list[str]] = {}
    events: list[Event] = []
    run_on(cluster, what, events.append, None)  # type: ignore[arg-type]
    assert isinstance(events[-1], Finished)
    for event in events:
        if isinstance(event, Undecided):
            said.setdefault(event.task, []).append(event.refusal.message)
    return said


# --- the cut ---------------------------------------------------------------------------------------------------------


def needs(what: Job, *nodes: Node) -> list[tuple[list[int], Needs]]:
    cluster = Scripted(lambda _, tasks: [settled(task) for task in tasks], *nodes)
    assert set(heard(cluster, what)) == {task.index for group in what.groups for task in group.tasks}
    return cluster.parts


def test_each_base_is_kept_on_one_node_and_each_node_has_two_workers() -> None:
    nodes = [Node(id=name, cpus=8, gpus=0, memory_bytes=64 * GIB) for name in "ab"]
    parts = needs(job(6, 6), *nodes)
    assert [(one.node, one.cpus, one.gpus) for _, one in parts] == [("a", 4, 0), ("a", 4, 0), ("b", 4, 0), ("b", 4, 0)]
    for node, tasks in (("a", set(range(6))), ("b", set(range(6, 12)))):
        assert {index for part, one in parts if one.node == node for index in part} == tasks


def test_each_gpu_of_a_machine_has_a_worker_and_nothing_runs_beside_them() -> None:
    nodes = [Node(id="cpu", cpus=64, gpus=0, memory_bytes=64 * GIB), Node(id="gpu", cpus=16, gpus=4, memory_bytes=GIB)]
    parts = needs(job(8), *nodes)
    assert [(one.node, one.cpus, one.gpus, len(tasks)) for tasks, one in parts] == [("gpu", 4, 1, 2)] * 4
    assert {one.gpus for _, one in needs(job(8, device="cpu"), *nodes)} == {0}


def test_no_worker_asks_for_more_than_its_node_has() -> None:
    (_, first), (_, second) = needs(job(4), Node(id="a", cpus=2, gpus=0, memory_bytes=GIB))
    assert first.memory_bytes + second.memory_bytes <= GIB
    assert first.cpus + second.cpus <= 2


def test_a_cluster_without_a_processor_is_said() -> None:
    cluster = Scripted(lambda *_: [])
    cluster._nodes = ()
    with pytest.raises(GateError, match="no node with a processor"):
        heard(cluster, job(1))


# --- losses ----------------------------------------------------------------------------------------------------------

LOST = LostError("WorkerCrashedError: it died")


def test_what_was_judged_is_not_judged_again() -> None:
    cluster = Scripted(lambda number, tasks: [settled(tasks[0]), [MergeStarted(task=tasks[1])], LOST] if number == 1
                       else [settled(task) for task in tasks])  # fmt: skip
    assert heard(cluster, job(3)) == {0: ["done"], 1: ["done"], 2: ["done"]}
    assert [tasks for tasks, _ in cluster.parts] == [[0, 1, 2], [1, 2]]


def test_an_adapter_that_was_under_way_twice_is_to_blame_and_no_other() -> None:
    cluster = Scripted(lambda _, tasks: [[MergeStarted(task=1)], LOST] if 1 in tasks
                       else [settled(task) for task in tasks])  # fmt: skip
    said = heard(cluster, job(3))
    assert said[0] == said[2] == ["done"]
    assert len(said[1]) == 1
    assert "lost twice while it merged this adapter: WorkerCrashedError" in said[1][0]


def test_a_worker_that_is_always_lost_ends_with_a_sentence_for_each() -> None:
    cluster = Scripted(lambda *_: [LOST])
    said = heard(cluster, job(2))
    assert len(cluster.parts) == 3
    assert all("lost 3 times before it came to this adapter" in one for (one,) in said.values())


def test_a_part_that_ends_too_early_leaves_no_adapter_without_a_word() -> None:
    said = heard(Scripted(lambda _, tasks: [settled(tasks[0])]), job(2))
    assert said[0] == ["done"]
    assert "finished without a word" in said[1][0]


def test_a_node_that_is_gone_is_replaced_or_missed() -> None:
    nodes = [Node(id=name, cpus=1, gpus=0, memory_bytes=GIB) for name in "ab"]
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
    assert all("no other node" in one for (one,) in heard(cluster, job(2)).values())


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
def part(shelf: Shelf, tmp_path: Path) -> Part:
    """One adapter on a base of its own."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(shelf.base("llama"), base)
    shutil.copytree(shelf.adapter("plain"), adapter)
    files = preflight(str(adapter), allow_pickle=False)
    group = Group(label="./base", directory=str(base), dtype="float32", tasks=(Task(index=7, files=(files,)),))
    digest = digest_directory(str(base), base_weight_files(str(base)))
    expected = Expected(identity=base_identity(str(base)), sha256=digest)
    return Part(job=Job(groups=(group,), device="cpu"), bases=(expected,), versions_sha256=versions())


def events_of(part: Part) -> list[Event]:
    return [event for batch in run_part(part) for event in batch]


def moved(part: Part) -> Part:
    """The run has seen the same files on another machine: their identities there are others."""
    (group,) = part.job.groups
    (files,) = group.tasks[0].files
    there = tuple(replace(one, identity=replace(one.identity, device=99)) for one in files.files)
    task = replace(group.tasks[0], files=(replace(files, files=there),))
    base = replace(part.bases[0], identity=tuple(replace(one, device=99) for one in part.bases[0].identity))
    return replace(part, job=replace(part.job, groups=(replace(group, tasks=(task,)),)), bases=(base,))


def test_the_same_bytes_on_another_machine_are_judged(part: Part) -> None:
    there = moved(part)
    events = events_of(there)
    assert sum(isinstance(event, Merged) for event in events) == 1
    (loaded,) = (event for event in events if isinstance(event, BaseLoaded))
    assert loaded.identity == there.bases[0].identity, "the run compares it with what it saw itself"
    assert not any(isinstance(event, Finished) for event in events)


def refused(part: Part) -> str:
    (event,) = events_of(part)
    assert isinstance(event, Undecided)
    assert event.task == 7
    assert not any(isinstance(one, BaseLoading) for one in events_of(part))
    return event.refusal.message


def test_other_bytes_on_a_node_are_an_error(part: Part) -> None:
    (group,) = part.job.groups
    poison("lora_B")(Path(group.tasks[0].files[0].directory))
    assert "has another adapter_model.safetensors of the adapter: its SHA-256 is" in refused(part)
    Path(group.tasks[0].files[0].directory, "adapter_model.safetensors").unlink()
    assert "cannot read adapter_model.safetensors of the adapter: No such file" in refused(part)


def test_another_base_on_a_node_is_an_error(part: Part) -> None:
    there = moved(part)
    assert "has another base ./base" in refused(replace(there, bases=(replace(there.bases[0], sha256="0" * 64),)))
    assert "has another base ./base" in refused(replace(there, bases=(replace(there.bases[0], sha256=None),)))
    shutil.rmtree(part.job.groups[0].directory)
    assert "does not have base ./base" in refused(part)


def test_other_versions_on_a_node_are_an_error(part: Part) -> None:
    assert "has other versions of the libraries" in refused(replace(part, versions_sha256="0" * 64))
