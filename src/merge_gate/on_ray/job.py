"""A job on a Ray cluster: cut by node and base, spread, listened to, and taken up again where a worker or a node dies.

In: a `Job`, and an address. Out: events, as from `worker/supervisor.py`: every task gets exactly one `Merged` or
`Undecided`. Knows neither Ray nor reports.

1. Each node gets adapters of as few bases as possible; on a node, so does each of its workers.
2. A worker's part is one task of Ray's, with the cores, the GPU and the memory that it needs.
3. One that is lost is begun again with what it had not judged yet. An adapter that was under way twice is to blame.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from merge_gate.errors import GateError
from merge_gate.files.base_watch import BaseWatch
from merge_gate.files.identity import base_identity
from merge_gate.on_ray import ray_cluster
from merge_gate.on_ray.ray_cluster import Cluster, LostError, Resources
from merge_gate.on_ray.ray_task import Expected, RayPart, versions
from merge_gate.records.refusals import NotJudged
from merge_gate.shards.costs import LOAD_BYTES, MERGE_BYTES, Cost
from merge_gate.shards.partition import assign
from merge_gate.worker.protocol import (
    Event,
    Finished,
    Group,
    Idle,
    Job,
    Listener,
    Merged,
    MergeStarted,
    Task,
    Undecided,
)

WORKERS_PER_NODE = 2
"""On a node without GPUs: while one of them loads a base, the other one merges."""

WORKER_BYTES = 1 << 30
"""What a worker needs besides its base."""

PATIENCE_S = 0.5
MOST_LOSSES = 3
"""How often a worker's part is begun again without anything judged in between."""


@dataclass
class _Worker:
    """One worker's part, as far as it is known."""

    job: Job
    needs: Resources
    left: set[int]
    under_way: int | None = None
    blamed: Counter[int] = field(default_factory=Counter)
    losses: int = 0


def judge_on_ray(address: str, job: Job, listen: Listener, watch: BaseWatch) -> None:
    """Run a job on the cluster at `address`, or on one that is started on this machine if that is `LOCAL`.

    Raises:
        GateError: there is no such cluster.
    """

    def digest_of(directory: str) -> str | None:
        watch.wait()
        return watch.digest(directory)

    with ray_cluster.cluster(address) as cluster:
        run_on(cluster, job, listen, None if address == ray_cluster.LOCAL else digest_of)


def run_on(cluster: Cluster, job: Job, listen: Listener, digest_of: Callable[[str], str | None] | None) -> None:
    """Run a job to its end.

    `digest_of` gives the digest of a base's weights, by which another machine can tell whether it has the same; None
    where all nodes are this machine.

    Raises:
        GateError: the cluster has no node that could do anything.
    """
    nodes = cluster.nodes()
    if not nodes:
        raise GateError("the Ray cluster has no node with a processor to spare", hint="add a node to it")
    bases = tuple(_expected(group, digest_of) for group in job.groups)
    running = {}
    try:
        for worker in _workers(job, nodes):
            running[_begin(cluster, worker, bases)] = worker
        while running:
            ready = cluster.ready(list(running), PATIENCE_S)
            if not ready:
                listen(Idle())
            for one in ready:
                _hear(cluster, running, one, bases, listen)
        listen(Finished())
    finally:
        for one in running:
            cluster.cancel(one)


def _begin(cluster: Cluster, worker: _Worker, bases: tuple[Expected, ...]) -> Any:
    groups = tuple(
        replace(group, tasks=tuple(task for task in group.tasks if task.index in worker.left))
        for group in worker.job.groups
    )
    job = replace(worker.job, groups=groups)
    return cluster.submit(RayPart(job=job, bases=bases, versions_sha256=versions()), worker.needs)


def _hear(
    cluster: Cluster, running: dict[Any, _Worker], one: Any, bases: tuple[Expected, ...], listen: Listener
) -> None:
    worker = running[one]
    try:
        events = cluster.events(one)
    except LostError as error:
        del running[one]
        _settle_loss(worker, str(error), listen)
        _again(cluster, running, worker, bases, listen)
        return
    if events is None:
        del running[one]
        for index in sorted(worker.left):
            _undecided(worker, index, "finished without a word about this adapter", listen)
        return
    for event in events:
        _note(worker, event)
        listen(event)


def _note(worker: _Worker, event: Event) -> None:
    if isinstance(event, MergeStarted):
        worker.under_way = event.task if not event.others else None
    elif isinstance(event, Merged | Undecided):
        worker.left.discard(event.task)
        worker.under_way, worker.losses = None, 0


def _settle_loss(worker: _Worker, why: str, listen: Listener) -> None:
    worker.losses += 1
    if worker.under_way is not None:
        worker.blamed[worker.under_way] += 1
        if worker.blamed[worker.under_way] > 1:
            _undecided(worker, worker.under_way, f"was lost twice while it merged this adapter: {why}", listen)
            worker.losses = 0
    worker.under_way = None
    if worker.losses >= MOST_LOSSES:
        for index in sorted(worker.left):
            _undecided(worker, index, f"was lost {MOST_LOSSES} times before it came to this adapter: {why}", listen)


def _again(
    cluster: Cluster, running: dict[Any, _Worker], worker: _Worker, bases: tuple[Expected, ...], listen: Listener
) -> None:
    """Begin what is left, on a node that is there."""
    if not worker.left:
        return
    fit = [node for node in cluster.nodes() if node.gpus >= worker.needs.gpus]
    if not fit:
        for index in sorted(worker.left):
            _undecided(worker, index, "was lost, and the cluster has no other node for it", listen)
        return
    node = next((one for one in fit if one.node == worker.needs.node), fit[0])
    memory, cpus = min(worker.needs.memory_bytes, node.memory_bytes), min(worker.needs.cpus, node.cpus)
    worker.needs = replace(worker.needs, node=node.node, cpus=cpus, memory_bytes=memory)
    running[_begin(cluster, worker, bases)] = worker


def _undecided(worker: _Worker, index: int, why: str, listen: Listener) -> None:
    worker.left.discard(index)
    hint = "look at the node's log and its memory, and run the gate again"
    listen(Undecided(task=index, refusal=NotJudged(message=f"a worker on the Ray cluster {why}", hint=hint)))


# --- the cut -------------------------------------------------------------------------------------------------------


def _expected(group: Group, digest_of: Callable[[str], str | None] | None) -> Expected:
    try:
        identity = base_identity(group.directory)
    except OSError:  # the worker says what is wrong with it
        identity = ()
    return Expected(identity=identity, sha256=digest_of(group.directory) if digest_of is not None else None)


def _workers(job: Job, nodes: tuple[Resources, ...]) -> list[_Worker]:
    on_gpus = job.device != "cpu" and any(node.gpus for node in nodes)
    usable = [node for node in nodes if node.gpus or not on_gpus]
    sizes = {index: _base_bytes(group) for index, group in enumerate(job.groups)}
    group_of = {task.index: number for number, group in enumerate(job.groups) for task in group.tasks}
    costs = {
        task.index: _cost(task, sizes[number], number)
        for number, group in enumerate(job.groups)
        for task in group.tasks
    }
    by_node = assign(costs, len(usable))
    workers = []
    for place, node in enumerate(usable):
        count = node.gpus if on_gpus else min(WORKERS_PER_NODE, node.cpus)
        ours = {index: costs[index] for index in costs if by_node[index] == place}
        by_worker = assign(ours, count) if ours else {}
        for number in range(count):
            left = {index for index, worker in by_worker.items() if worker == number}
            if left:
                largest = max(sizes[group_of[index]] for index in left)
                needs = Resources(
                    node=node.node,
                    cpus=max(node.cpus // count, 1),
                    gpus=int(on_gpus),
                    memory_bytes=min(WORKER_BYTES + largest, node.memory_bytes // count),
                )
                device = "cuda" if on_gpus else job.device  # Ray shows each worker its own one, whatever its number
                workers.append(_Worker(job=replace(job, device=device), needs=needs, left=left))
    return workers


def _cost(task: Task, base_bytes: int, group: int) -> Cost:
    own = sum(file.size_bytes for files in task.files for file in files.files)
    return Cost(
        base=(f"{group:09}", ""), read_bytes=LOAD_BYTES + base_bytes, merge_bytes=MERGE_BYTES + base_bytes + own
    )


def _base_bytes(group: Group) -> int:
    try:
        return sum(file.size_bytes for file in base_identity(group.directory))
    except OSError:
        return 0
