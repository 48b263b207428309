"""Runs a job on a Ray cluster: splits it by node and base, and restarts the part of a worker or node that dies.

A `Job` and an address go in. The events of `worker/supervisor.py` come out: every task gets exactly one `Merged` or
`Undecided`. This module does not import Ray.

1. Each node, and each worker on a node, gets adapters of as few bases as possible.
2. The part of a worker is one Ray task, which requests the cores, the GPU, and the memory that it needs.
3. A lost part is restarted with the adapters that it had not judged. An adapter that was in progress at two losses is
   blamed for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from merge_gate.cache.key import versions_digest
from merge_gate.errors import GateError
from merge_gate.files.base_watch import BaseWatch
from merge_gate.files.identity import base_bytes, base_identity
from merge_gate.limits.time_limit import ANSWER_LIMIT_S, within
from merge_gate.on_ray import ray_cluster
from merge_gate.on_ray.ray_cluster import Cluster, LostError, Resources
from merge_gate.on_ray.ray_task import Expected, RayPart
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
    concerns,
)

WORKERS_PER_NODE = 2
"""Workers on a node without GPUs: while one loads a base, the other merges."""

WORKER_BYTES = 1 << 30
"""The memory of a worker without its base."""

PATIENCE_S = 0.5
MAX_LOSSES = 3
"""How many losses in a row, without a verdict in between, end a worker's part."""


@dataclass
class _WorkerPart:
    """The part of one worker, and its progress."""

    job: Job
    needs: Resources
    remaining: set[int]
    """Indices of the tasks without a verdict."""
    in_progress: int | None = None
    losses_of: Counter[int] = field(default_factory=Counter)
    """How often the part was lost during each task."""
    losses: int = 0
    """Losses since the last verdict."""


def judge_on_ray(address: str, job: Job, listen: Listener, watch: BaseWatch) -> None:
    """Run a job on the cluster at `address`, or on a new cluster on this machine if that is `LOCAL`.

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

    `digest_of` returns the digest of a base's weights, so that another machine can check that it has the same base. It
    is None if all nodes are this machine.

    Raises:
        GateError: the cluster has no usable node.
    """
    nodes = cluster.nodes()
    if not nodes:
        raise GateError("the Ray cluster has no node with a CPU", hint="add a node to the cluster")
    bases = tuple(_expected(group, digest_of) for group in job.groups)
    running = {}
    try:
        # 1 and 2. Split the job, and submit each part.
        for part in _split(job, nodes):
            running[_submit(cluster, part, bases)] = part
        while running:
            ready = cluster.ready(list(running), PATIENCE_S)
            if not ready:
                listen(Idle())
            for task in ready:
                _receive(cluster, running, task, bases, listen)
        listen(Finished())
    finally:
        for task in running:
            cluster.cancel(task)


def _submit(cluster: Cluster, part: _WorkerPart, bases: tuple[Expected, ...]) -> Any:
    groups = tuple(
        replace(group, tasks=tuple(task for task in group.tasks if task.index in part.remaining))
        for group in part.job.groups
    )
    job = replace(part.job, groups=groups)
    return cluster.submit(RayPart(job=job, bases=bases, versions_sha256=versions_digest()), part.needs)


def _receive(
    cluster: Cluster, running: dict[Any, _WorkerPart], task: Any, bases: tuple[Expected, ...], listen: Listener
) -> None:
    part = running[task]
    try:
        events = cluster.events(task)
    except LostError as error:  # 3.
        del running[task]
        _blame(part, str(error), listen)
        _restart(cluster, running, part, bases, listen)
        return
    if events is None:
        del running[task]
        for index in sorted(part.remaining):
            _undecided(part, index, "finished without a result for this adapter", listen)
        return
    for event in events:
        if concerns(event, part.remaining, len(part.job.groups)):
            _track(part, event)
            listen(event)


def _track(part: _WorkerPart, event: Event) -> None:
    if isinstance(event, MergeStarted):
        part.in_progress = event.task if not event.others else None
    elif isinstance(event, Merged | Undecided):
        part.remaining.discard(event.task)
        part.in_progress, part.losses = None, 0


def _blame(part: _WorkerPart, reason: str, listen: Listener) -> None:
    """Give up the adapter that was in progress at two losses, or the whole part after too many losses."""
    part.losses += 1
    if part.in_progress is not None:
        part.losses_of[part.in_progress] += 1
        if part.losses_of[part.in_progress] > 1:
            _undecided(part, part.in_progress, f"was lost twice while it merged this adapter: {reason}", listen)
            part.losses = 0
    part.in_progress = None
    if part.losses >= MAX_LOSSES:
        for index in sorted(part.remaining):
            _undecided(part, index, f"was lost {MAX_LOSSES} times before it reached this adapter: {reason}", listen)


def _restart(
    cluster: Cluster, running: dict[Any, _WorkerPart], part: _WorkerPart, bases: tuple[Expected, ...], listen: Listener
) -> None:
    """Submit the remaining tasks again, on a node that is up."""
    if not part.remaining:
        return
    usable = [node for node in cluster.nodes() if node.gpus >= part.needs.gpus]
    if not usable:
        for index in sorted(part.remaining):
            _undecided(part, index, "was lost, and the cluster has no other node for it", listen)
        return
    node = next((node for node in usable if node.node == part.needs.node), usable[0])
    memory, cpus = min(part.needs.memory_bytes, node.memory_bytes), min(part.needs.cpus, node.cpus)
    part.needs = replace(part.needs, node=node.node, cpus=cpus, memory_bytes=memory)
    running[_submit(cluster, part, bases)] = part


def _undecided(part: _WorkerPart, index: int, reason: str, listen: Listener) -> None:
    part.remaining.discard(index)
    hint = "check the node's log and its memory, and run the gate again"
    message = f"a worker on the Ray cluster {reason}"
    listen(Undecided(task=index, refusal=NotJudged(message=message, hint=hint)))


# --- the split -----------------------------------------------------------------------------------------------------


def _expected(group: Group, digest_of: Callable[[str], str | None] | None) -> Expected:
    try:
        identity = within(ANSWER_LIMIT_S, lambda: base_identity(group.directory))
    except OSError:  # the worker reports the problem, also that the mount does not answer
        identity = ()
    return Expected(identity=identity, sha256=digest_of(group.directory) if digest_of is not None else None)


def _split(job: Job, nodes: tuple[Resources, ...]) -> list[_WorkerPart]:
    on_gpus = job.device != "cpu" and any(node.gpus for node in nodes)
    usable = [node for node in nodes if node.gpus or not on_gpus]
    of_bases = {directory: base_bytes(directory) or 0 for directory in {group.directory for group in job.groups}}
    sizes = {index: of_bases[group.directory] for index, group in enumerate(job.groups)}
    group_of = {task.index: number for number, group in enumerate(job.groups) for task in group.tasks}
    costs = {
        task.index: _cost(task, sizes[number], number)
        for number, group in enumerate(job.groups)
        for task in group.tasks
    }
    by_node = assign(costs, len(usable))
    parts = []
    for place, node in enumerate(usable):
        count = node.gpus if on_gpus else min(WORKERS_PER_NODE, node.cpus)
        on_node = {index: costs[index] for index in costs if by_node[index] == place}
        by_worker = assign(on_node, count) if on_node else {}
        for number in range(count):
            tasks = {index for index, worker in by_worker.items() if worker == number}
            if tasks:
                largest = max(sizes[group_of[index]] for index in tasks)
                needs = Resources(
                    node=node.node,
                    cpus=max(node.cpus // count, 1),
                    gpus=int(on_gpus),
                    memory_bytes=min(WORKER_BYTES + largest, node.memory_bytes // count),
                )
                device = "cuda" if on_gpus else job.device  # Ray shows each worker only its own GPU
                parts.append(_WorkerPart(job=replace(job, device=device), needs=needs, remaining=tasks))
    return parts


def _cost(task: Task, size_bytes: int, group: int) -> Cost:
    own = sum(file.size_bytes for files in task.files for file in files.files)
    return Cost(
        base=(f"{group:09}", ""), read_bytes=LOAD_BYTES + size_bytes, merge_bytes=MERGE_BYTES + size_bytes + own
    )
