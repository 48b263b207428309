"""Owns the worker process, and decides what its death or a time limit costs.

In: a `Job`, with one group for each base. Out: events, in order. Every task gets exactly one `Merged` or `Undecided`.

1. A process gets the job, and sends events until `Finished`.
2. If it dies or exceeds a time limit while it merges an adapter, that adapter is `error`. A new process continues.
3. If it dies elsewhere (imports, the load of a base, between two adapters), a new process tries the same again, once.
   Then the adapters that waited for it are `error`. A load that exceeds its limit is not tried again.
4. If it dies or exceeds its time limit while it merges several adapters in one pass, a new process merges those that
   were in progress one at a time, and the others in one pass as before. If none was, it merges them in two passes.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from typing import Self, assert_never

from merge_gate.errors import GateError
from merge_gate.records.refusals import NotJudged
from merge_gate.text import counted
from merge_gate.worker.call_service import Feeds
from merge_gate.worker.channel import GarbledError
from merge_gate.worker.process import Ending, WorkerProcess
from merge_gate.worker.protocol import (
    DEFAULT_LIMIT_S,
    BaseLoaded,
    BaseLoading,
    BaseMeasured,
    DeviceChosen,
    Event,
    Finished,
    Idle,
    InProgress,
    Job,
    Listener,
    Merged,
    MergeProgressed,
    MergeStarted,
    Publisher,
    Task,
    Undecided,
    Waiting,
    concerns,
)

MOST_THREADS = 64
"""A worker that names more threads than this is not the gate's own code; the others are ignored."""

FIRST_NOTE_S = 60.0
"""A note names an adapter or a loading base after so long without an event, and again after twice as long."""

_MERGING = "while it merged this adapter"


class WorkerSlot:
    """The owner of a run's worker process. There is at most one at a time.

    1. It is started before the configuration is read, and imports what it needs meanwhile.    `start_early`
    2. It gets a job. After that, or after its death, the next job gets a new process.         `run`
    3. Without adapters, a job only reports the device. It takes the process like any other.   `choose_device`
    4. It ends with the `with` block, or earlier if there is nothing to merge.                 `end`
    """

    def __init__(self) -> None:
        self._process: WorkerProcess | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def is_started(self) -> bool:
        return self._process is not None

    def start_early(self) -> None:
        """Start the process if that is possible. If not, `start` tries again and raises the reason."""
        with contextlib.suppress(GateError, OSError):
            self.start()

    def start(self) -> None:
        """Start the process, unless there is one."""
        if self._process is None:
            self._process = WorkerProcess()

    def run(
        self, job: Job, attempt: Attempt, feeds: Feeds | None = None, publisher: Publisher | None = None
    ) -> Ending | None:
        """Run a job in the process. None if it finished, or how the process ended."""
        self.start()
        assert self._process is not None  # noqa: S101 - `start` made one
        try:
            return self._process.run(
                job, attempt.receive, is_overdue=attempt.is_overdue, feeds=feeds, publisher=publisher
            )
        finally:
            self.end()

    def choose_device(self, requested: str) -> DeviceChosen | None:
        """The device that torch would choose for `requested`, and its name. None if the process fails."""
        chosen: list[DeviceChosen] = []

        def listen(event: Event) -> None:
            if isinstance(event, DeviceChosen):
                chosen.append(event)

        job = Job(groups=(), device=requested)
        self.run(job, Attempt(job, listen))
        return chosen[-1] if chosen else None

    def end(self) -> None:
        """End the process, whatever it does. May be called more than once."""
        if self._process is not None:
            self._process.end()
        self._process = None


def supervise(
    job: Job, listen: Listener, worker: WorkerSlot, feeds: Feeds | None = None, publisher: Publisher | None = None
) -> None:
    """Run a job to its end. Every task gets exactly one `Merged` or `Undecided`, whatever happens to the process.

    `worker` may hold a process that was started before the job was known. `feeds` opens the bases that this process
    reads for the worker; without it, they are local. `publisher` gets the tensors of the merges that are published.
    """
    feeds = feeds or Feeds()
    tried: set[tuple[str, int]] = set()
    while any(group.tasks for group in job.groups):
        attempt = Attempt(job, listen)
        ending = worker.run(job, attempt, feeds, publisher)  # 1
        if ending is None:
            attempt.settle_rest()
            return
        if attempt.is_at_a_batch:
            pass  # 4: `left` has its suspects one at a time
        elif attempt.is_at_an_adapter or attempt.place in tried or attempt.is_overdue():
            attempt.settle_death(ending)  # 2
        else:
            tried.add(attempt.place)  # 3
        job = attempt.left()


class Attempt:
    """The events of one process on a job, which say what its death costs."""

    def __init__(self, job: Job, listen: Listener) -> None:
        self._job = job
        self._listen = listen
        self._settled: set[int] = set()
        self._task: int | None = None
        self._others: tuple[int, ...] = ()
        self._in_progress: dict[int | None, int] = {}  # by thread
        self._group: int | None = None
        self._progress = ""
        self._begin(DEFAULT_LIMIT_S)

    def _begin(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._began_s = self._last_event_s = time.monotonic()
        self._next_note_s = FIRST_NOTE_S

    def receive(self, event: Event) -> None:
        """Record what the process does now, and pass the event on.

        An event about anything but an open task is dropped: code that comes with a base could send it.
        """
        if not self._concerns(event):
            return
        match event:
            case BaseLoading():
                self._group, self._task, self._progress = event.group, None, ""
                self._begin(max(task.limit_s for task in self._job.groups[event.group].tasks))
            case BaseLoaded():
                self._group = None
                self._begin(DEFAULT_LIMIT_S)
            case MergeStarted():
                self._task, self._others, self._progress = event.task, event.others, ""
                self._in_progress = {}
                merging = {event.task, *event.others}
                self._begin(sum(task.limit_s for task in self._tasks() if task.index in merging))
            case InProgress():
                self._note_in_progress(event)
            case MergeProgressed():
                self._progress = f" (at {event.done:,} of {counted(event.total, 'module')}, {event.module})"
                self._last_event_s, self._next_note_s = time.monotonic(), FIRST_NOTE_S
            case Merged() | Undecided():
                self._settled.add(event.task)
                self._group, self._task, self._others = None, None, ()  # no base is loading any more
                self._begin(DEFAULT_LIMIT_S)
            case Idle():
                self._report_silence()
            case DeviceChosen() | BaseMeasured() | Finished() | Waiting():
                pass
            case _:
                assert_never(event)
        self._listen(event)

    def _concerns(self, event: Event) -> bool:
        try:
            return concerns(event, self._open(), len(self._job.groups))
        except TypeError as error:  # its fields have other types
            raise GarbledError(str(error)[:200]) from error

    def _note_in_progress(self, event: InProgress) -> None:
        if event.thread is None:
            self._in_progress.clear()
        self._in_progress.pop(None, None)
        if event.thread in self._in_progress or len(self._in_progress) < MOST_THREADS:
            self._in_progress[event.thread] = event.task

    def _report_silence(self) -> None:
        silent_s = time.monotonic() - self._last_event_s
        base = self._job.groups[self._group].base.name if self._group is not None else ""
        if (self._task is not None or base) and silent_s >= self._next_note_s:
            self._next_note_s *= 2
            self._listen(Waiting(task=self._task, base=base, seconds=silent_s, limit_s=self._limit_s))

    def is_overdue(self) -> bool:
        """Whether what the process does now exceeds its time limit."""
        return time.monotonic() - self._began_s > self._limit_s

    @property
    def is_at_a_batch(self) -> bool:
        """Whether several adapters are being merged together, and fewer of them would make a difference."""
        return bool(self._smaller_passes())

    @property
    def is_at_an_adapter(self) -> bool:
        """Whether the process merges an adapter, which is then to blame for a death."""
        return self._task is not None

    @property
    def place(self) -> tuple[str, int]:
        """Where in the job the process is. A second death at the same place is no accident."""
        if self._group is not None:
            return "base", self._group
        return "between", len(self._open())

    def settle_death(self, ending: Ending) -> None:
        """Report the tasks that the death costs as undecided."""
        late_s = self._limit_s if self.is_overdue() else None
        for index, what in self._lost():
            self._settled.add(index)
            refusal = _death(what, ending) if late_s is None else _late(f"{what}{self._progress}", late_s)
            self._listen(Undecided(task=index, refusal=refusal))

    def left(self) -> Job:
        """The job without the tasks that are settled. After the death of a pass, its suspects are in smaller ones."""
        smaller = self._smaller_passes()
        groups = tuple(
            replace(
                group,
                tasks=tuple(
                    replace(task, most_together=smaller.get(task.index, task.most_together))
                    for task in group.tasks
                    if task.index not in self._settled
                ),
            )
            for group in self._job.groups
        )
        return replace(self._job, groups=groups)

    def _smaller_passes(self) -> dict[int, int]:
        """How many adapters the next passes of the suspects may have, if that is fewer than before.

        Suspects are the adapters that were in progress, each alone, or else both halves of the pass.
        """
        batch = frozenset(self._others if self._task is None else (self._task, *self._others))
        if len(batch) < 2:  # noqa: PLR2004 - a pass of several
            return {}
        in_progress = batch.intersection(self._in_progress.values())
        most = 1 if in_progress else (len(batch) + 1) // 2
        suspects = in_progress or batch
        return {
            task.index: most
            for task in self._tasks()
            if task.index in suspects and (most < task.most_together or not task.most_together)
        }

    def settle_rest(self) -> None:
        """Report the tasks that a process finished without as undecided, so that none is missing in the report."""
        for index in self._open():
            why = "the gate's worker process finished without a result for this adapter"
            self._listen(Undecided(task=index, refusal=NotJudged(message=why, hint="please report this")))

    def _tasks(self) -> list[Task]:
        return [task for group in self._job.groups for task in group.tasks]

    def _open(self) -> list[int]:
        return [task.index for task in self._tasks() if task.index not in self._settled]

    def _lost(self) -> list[tuple[int, str]]:
        if self._task is not None:
            return [(self._task, _MERGING)]
        if self._group is not None:
            group = self._job.groups[self._group]
            what = f"while it loaded base {group.base.name}"
            return [(task.index, what) for task in group.tasks if task.index not in self._settled]
        return [(index, "before it came to this adapter") for index in self._open()]


def _death(what: str, ending: Ending) -> NotJudged:
    again = "" if what == _MERGING else " twice"
    return NotJudged(message=f"the gate's worker process died{again} {what}: {ending.text}", hint=ending.hint)


def _late(what: str, limit_s: float) -> NotJudged:
    return NotJudged(
        message=f"the gate's worker process was ended {what}: the time limit of {limit_s:g} s was over",
        hint="if the adapter or its base is large or the machine slow, set limits: {seconds: …} for the adapter",
    )
