"""Runs one part of a job on a node of a Ray cluster, in a supervised and confined worker. Does not import Ray.

A `RayPart` goes in; events come out in batches. The node must have the versions, and every byte of adapters and bases,
that the run was planned with. Otherwise the tasks concerned are `Undecided`.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from merge_gate.cache.key import versions_digest
from merge_gate.files.identity import base_identity, identity_of
from merge_gate.files.resolve import base_weight_files, digest_directory
from merge_gate.records.files import AdapterFiles, FileIdentity, FileRecord
from merge_gate.records.refusals import NotJudged
from merge_gate.records.terms import Origin, record
from merge_gate.worker.protocol import BaseLoaded, Event, Finished, Group, Idle, Job, MergeProgressed, Task, Undecided
from merge_gate.worker.supervisor import WorkerSlot, supervise

MAX_BATCH = 20
"""The most events in a batch. The event of a merge may have hundreds of kilobytes."""

_SHARED = "give every node the same files at the same paths: use a shared file system, also for the Hub's cache"


@record
class Expected:
    """The base of one group on the machine of the run: the identity of its files, and their digest if it is known."""

    identity: tuple[FileIdentity, ...]
    sha256: str | None


@record
class RayPart:
    """The work of one Ray task. `bases` has an item for each group of the job."""

    job: Job
    bases: tuple[Expected, ...]
    versions_sha256: str


def run_part(part: RayPart) -> Iterator[list[Event]]:
    """Judge a part. Every task gets a `Merged` or an `Undecided`."""
    if versions_digest() != part.versions_sha256:
        refusal = _refusal("has other versions of the libraries, or other code of merge-gate", _VERSIONS)
        yield [Undecided(task=task.index, refusal=refusal) for group in part.job.groups for task in group.tasks]
        return
    groups, undecided = _groups_on_node(part)
    if undecided:
        yield undecided
    events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()
    bases = _BaseEvents(part, events)
    threading.Thread(target=_supervise, args=(replace(part.job, groups=groups), bases, events), daemon=True).start()
    yield from _batches(events)


_VERSIONS = "install the same versions on every node"


class _BaseEvents:
    """Passes events on. It replaces the identity of a base's files on this node by the identity that the run knows."""

    def __init__(self, part: RayPart, events: queue.SimpleQueue[Event | BaseException | None]) -> None:
        self._part, self._events = part, events
        self._loaded: list[tuple[BaseLoaded, tuple[FileIdentity, ...]]] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, BaseLoaded):
            self._loaded.append((event, event.identity))
            event = replace(event, identity=self._part.bases[event.group].identity)
        if not isinstance(event, Idle | Finished):
            self._events.put(event)

    def end(self) -> None:
        """Report each base that has changed since it was loaded, so that the run voids the verdicts on it."""
        for event, identity in self._loaded:
            if _identity(self._part.job.groups[event.group].directory) != identity:
                self._events.put(replace(event, identity=()))


def _supervise(job: Job, bases: _BaseEvents, events: queue.SimpleQueue[Event | BaseException | None]) -> None:
    try:
        with WorkerSlot() as worker:
            supervise(job, bases, worker)
        bases.end()
        events.put(None)
    except BaseException as error:  # noqa: BLE001 - `_batches` raises it again
        events.put(error)


def _batches(events: queue.SimpleQueue[Event | BaseException | None]) -> Iterator[list[Event]]:
    while True:
        batch: list[Event] = []
        event = events.get()
        while isinstance(event, Event):
            if batch and isinstance(batch[-1], MergeProgressed) and isinstance(event, MergeProgressed):
                batch.pop()
            batch.append(event)
            if len(batch) == MAX_BATCH or events.empty():
                break
            event = events.get()
        if batch:
            yield batch
        if isinstance(event, BaseException):
            raise event
        if event is None:
            return


# --- the files on this node ----------------------------------------------------------------------------------------


def _groups_on_node(part: RayPart) -> tuple[tuple[Group, ...], list[Event]]:
    """The groups with the identities of files on this node, and an event for each task that cannot be judged here."""
    groups: list[Group] = []
    undecided: list[Event] = []
    for group, expected in zip(part.job.groups, part.bases, strict=True):
        base_refusal = _check_base(group, expected) if group.tasks else None
        tasks = []
        for task in group.tasks:
            checked = base_refusal or _task_on_node(task)
            if isinstance(checked, NotJudged):
                undecided.append(Undecided(task=task.index, refusal=checked))
            else:
                tasks.append(checked)
        groups.append(replace(group, tasks=tuple(tasks)))
    return tuple(groups), undecided


def _identity(directory: str) -> tuple[FileIdentity, ...] | None:
    try:
        return base_identity(directory)
    except OSError:
        return None


def _check_base(group: Group, expected: Expected) -> NotJudged | None:
    """Check that this node has the base of the run: by the identity of its files, or else by their digest."""
    identity = _identity(group.directory)
    if identity is None:
        return _refusal(f"does not have base {group.base.name} at the path of the run", _SHARED, Origin.BASE)
    if identity == expected.identity:
        return None
    try:
        digest = digest_directory(group.directory, base_weight_files(group.directory))
    except Exception as error:  # noqa: BLE001 - after any error, the base of the run is not there
        return _refusal(f"cannot read base {group.base.name}: {error}", _SHARED, Origin.BASE)
    if digest == expected.sha256 and _identity(group.directory) == identity:
        return None
    return _refusal(
        f"has another base {group.base.name}: the SHA-256 of its weights is {digest}, expected {expected.sha256}",
        _SHARED,
        Origin.BASE,
    )


def _task_on_node(task: Task) -> Task | NotJudged:
    members = []
    for files in task.files:
        records = []
        for expected in files.files:
            record_on_node = _file_on_node(files, expected)
            if isinstance(record_on_node, NotJudged):
                return record_on_node
            records.append(record_on_node)
        members.append(replace(files, files=tuple(records)))
    return replace(task, files=tuple(members))


def _file_on_node(files: AdapterFiles, expected: FileRecord) -> FileRecord | NotJudged:
    try:
        with Path(files.directory, expected.path).open("rb") as file:
            identity = identity_of(expected.path, os.fstat(file.fileno()))
            if identity == expected.identity:
                return expected
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return _refusal(f"cannot read {expected.path} of the adapter: {error.strerror}", _SHARED)
    if digest != expected.sha256:
        problem = f"has another {expected.path} of the adapter: its SHA-256 is {digest}, expected {expected.sha256}"
        return _refusal(problem, _SHARED)
    return replace(expected, identity=identity)


def _refusal(problem: str, hint: str, origin: Origin = Origin.RUNTIME) -> NotJudged:
    return NotJudged(message=f"node {os.uname().nodename} {problem}", hint=hint, origin=origin)
