"""What runs on a node of a Ray cluster: a part of a run's job, in the same supervised, confined worker as everywhere.

In: a `Part`. Out: events, a few at a time. Whatever lies here must be what the run was planned with: the versions,
every byte of every adapter, and of each base; where it is not, the tasks concerned are `Undecided`. Imports no Ray.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from merge_gate.cache import key
from merge_gate.files.identity import base_identity, identity_of
from merge_gate.files.resolve import base_weight_files, digest_directory
from merge_gate.records.files import AdapterFiles, FileIdentity, FileRecord
from merge_gate.records.refusals import NotJudged
from merge_gate.records.terms import Origin, record
from merge_gate.worker.protocol import BaseLoaded, Event, Finished, Group, Idle, Job, MergeProgressed, Task, Undecided
from merge_gate.worker.supervisor import supervise

MOST_EVENTS = 20
"""How many events travel at once: one of a merge may hold hundreds of kilobytes."""

_SHARED = "let every node see the same files under the same names: a shared file system, with the Hub's cache on it"


@record
class Expected:
    """The base of one group as the run saw it: the identity of its files there, and their digest where it was taken."""

    identity: tuple[FileIdentity, ...]
    sha256: str | None


@record
class RayPart:
    """What one task of Ray's does. `bases` has an item for each group of the job, which keeps its numbers."""

    job: Job
    bases: tuple[Expected, ...]
    versions_sha256: str


def versions() -> str:
    """The digest of all code that decides a verdict."""
    return key.key_of([key.own_code(), key.libraries()])


def run_part(part: RayPart) -> Iterator[list[Event]]:
    """Judge a part; every task gets a `Merged` or an `Undecided`."""
    if versions() != part.versions_sha256:
        refusal = _refusal("has other versions of the libraries, or other code of merge-gate", _VERSIONS)
        yield [Undecided(task=task.index, refusal=refusal) for group in part.job.groups for task in group.tasks]
        return
    groups, refused = _groups_here(part)
    if refused:
        yield refused
    events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()
    bases = _Bases(part, events)
    threading.Thread(target=_supervised, args=(replace(part.job, groups=groups), bases, events), daemon=True).start()
    yield from _batches(events)


_VERSIONS = "install the same versions on every node"


class _Bases:
    """Hears the events; the identity of a base's files here becomes that of the run, as long as they stay the same."""

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
        """A base that is no longer what was loaded takes the verdicts on it along: the run hears that it is another."""
        for event, identity in self._loaded:
            if _identity(self._part.job.groups[event.group].directory) != identity:
                self._events.put(replace(event, identity=()))


def _supervised(job: Job, bases: _Bases, events: queue.SimpleQueue[Event | BaseException | None]) -> None:
    try:
        supervise(job, bases)
        bases.end()
        events.put(None)
    except BaseException as error:  # noqa: BLE001 - it is raised again where the run hears it
        events.put(error)


def _batches(events: queue.SimpleQueue[Event | BaseException | None]) -> Iterator[list[Event]]:
    while True:
        batch: list[Event] = []
        event = events.get()
        while isinstance(event, Event):
            if batch and isinstance(batch[-1], MergeProgressed) and isinstance(event, MergeProgressed):
                batch.pop()
            batch.append(event)
            if len(batch) == MOST_EVENTS or events.empty():
                break
            event = events.get()
        if batch:
            yield batch
        if isinstance(event, BaseException):
            raise event
        if event is None:
            return


# --- what lies here ------------------------------------------------------------------------------------------------


def _groups_here(part: RayPart) -> tuple[tuple[Group, ...], list[Event]]:
    """The groups as they lie here, and what cannot be judged here."""
    groups: list[Group] = []
    refused: list[Event] = []
    for group, expected in zip(part.job.groups, part.bases, strict=True):
        why = _other_base(group, expected) if group.tasks else None
        tasks = []
        for task in group.tasks:
            found = why or _task_here(task)
            if isinstance(found, NotJudged):
                refused.append(Undecided(task=task.index, refusal=found))
            else:
                tasks.append(found)
        groups.append(replace(group, tasks=tuple(tasks)))
    return tuple(groups), refused


def _identity(directory: str) -> tuple[FileIdentity, ...] | None:
    try:
        return base_identity(directory)
    except OSError:
        return None


def _other_base(group: Group, expected: Expected) -> NotJudged | None:
    """Files with the identity that the run saw are those files. On another machine only their bytes can tell."""
    here = _identity(group.directory)
    if here is None:
        return _refusal(f"does not have base {group.base.name} at the place where the run has it", _SHARED, Origin.BASE)
    if here == expected.identity:
        return None
    try:
        digest = digest_directory(group.directory, base_weight_files(group.directory))
    except Exception as error:  # noqa: BLE001 - whatever lies there, it is not the base that was meant
        return _refusal(f"cannot read base {group.base.name}: {error}", _SHARED, Origin.BASE)
    if digest == expected.sha256 and _identity(group.directory) == here:
        return None
    return _refusal(
        f"has another base {group.base.name}: the SHA-256 of its weights is {digest}, expected {expected.sha256}",
        _SHARED,
        Origin.BASE,
    )


def _task_here(task: Task) -> Task | NotJudged:
    members = []
    for files in task.files:
        records = []
        for one in files.files:
            found = _file_here(files, one)
            if isinstance(found, NotJudged):
                return found
            records.append(found)
        members.append(replace(files, files=tuple(records)))
    return replace(task, files=tuple(members))


def _file_here(files: AdapterFiles, expected: FileRecord) -> FileRecord | NotJudged:
    try:
        with Path(files.directory, expected.path).open("rb") as file:
            found = identity_of(expected.path, os.fstat(file.fileno()))
            if found == expected.identity:
                return expected
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return _refusal(f"cannot read {expected.path} of the adapter: {error.strerror}", _SHARED)
    if digest != expected.sha256:
        said = f"has another {expected.path} of the adapter: its SHA-256 is {digest}, expected {expected.sha256}"
        return _refusal(said, _SHARED)
    return replace(expected, identity=found)


def _refusal(said: str, hint: str, origin: Origin = Origin.RUNTIME) -> NotJudged:
    return NotJudged(message=f"node {os.uname().nodename} {said}", hint=hint, origin=origin)
