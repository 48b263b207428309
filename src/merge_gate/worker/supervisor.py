"""The supervisor of the worker process: it outlives the child, and settles what dies with it or takes too long.

In: a `Job` of groups, one group per base. Out: events, in order; every task gets exactly one `Merged` or `Undecided`.
Imports no torch.

1. The parent starts a child and sends the job. 2. The child sends events until `Finished`. 3. If it dies before, or is
over its time limit, the adapter under way is `error`, and a new child goes on with the rest. 4. Where no adapter was
under way (imports, the load of a base, between two), a new child tries the same again, once; then those that waited for
it are `error`. A load that was over its limit is not tried again.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import assert_never

from merge_gate.records.refusals import NotJudged, Refusal
from merge_gate.records.terms import Quantization
from merge_gate.text import counted
from merge_gate.worker.process import Ending, WorkerProcess
from merge_gate.worker.protocol import (
    DEFAULT_LIMIT_S,
    BaseLoaded,
    BaseLoading,
    DeviceChosen,
    Event,
    Finished,
    Idle,
    Job,
    Listener,
    Merged,
    MergeProgressed,
    MergeStarted,
    Task,
    Undecided,
    Waiting,
)

FIRST_WORD_S = 60.0
"""After so long without a word of an adapter, or of a base that loads, it is named, and again after twice as long."""

_MERGING = "while it merged this adapter"


def supervise(job: Job, listen: Listener, child: WorkerProcess | None = None) -> None:
    """Run a job to its end. Every task gets exactly one `Merged` or `Undecided`, whatever happens to the child.

    `child` is one that was started before the job was known, so that its imports are done by now.
    """
    tried: set[tuple[str, int]] = set()
    while any(group.tasks for group in job.groups):
        attempt = Attempt(job, listen)
        quantizes = any(group.base.quantization != Quantization.NONE for group in job.groups)
        with child or WorkerProcess(quantizes=quantizes) as running:
            ending = running.run(job, attempt.receive, is_overdue=attempt.is_overdue)
        child = None
        if ending is None:
            attempt.settle_rest()
            return
        if attempt.is_at_a_batch:
            job = attempt.left(one_pass=False)
            continue
        if attempt.is_at_an_adapter or attempt.place in tried or attempt.is_overdue():
            attempt.settle_death(ending)
        else:
            tried.add(attempt.place)
        job = attempt.left()


class Attempt:
    """What one child has said of a job, so that it is known what its death costs."""

    def __init__(self, job: Job, listen: Listener) -> None:
        self._job = job
        self._listen = listen
        self._settled: set[int] = set()
        self._task: int | None = None
        self._others: tuple[int, ...] = ()
        self._group: int | None = None
        self._progress = ""
        self._begin(DEFAULT_LIMIT_S)

    def _begin(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._began_s = self._heard_s = time.monotonic()
        self._next_word_s = FIRST_WORD_S

    def receive(self, event: Event) -> None:
        """Note what the child is at, and pass the event on."""
        match event:
            case BaseLoading():
                self._group, self._task, self._progress = event.group, None, ""
                self._begin(max(task.limit_s for task in self._job.groups[event.group].tasks))
            case BaseLoaded():
                self._group = None
                self._begin(DEFAULT_LIMIT_S)
            case MergeStarted():
                self._task, self._others, self._progress = event.task, event.others, ""
                merging = {event.task, *event.others}
                self._begin(sum(task.limit_s for task in self._tasks() if task.index in merging))
            case MergeProgressed():
                self._progress = f" (at {event.done:,} of {counted(event.total, 'module')}, {event.module})"
                self._heard_s, self._next_word_s = time.monotonic(), FIRST_WORD_S
            case Merged() | Undecided():
                self._settled.add(event.task)
                self._group, self._task, self._others = None, None, ()  # no base is loading any more
                self._begin(DEFAULT_LIMIT_S)
            case Idle():
                self._name_what_is_silent()
            case DeviceChosen() | Finished() | Waiting():
                pass
            case _:
                assert_never(event)
        self._listen(event)

    def _name_what_is_silent(self) -> None:
        silent_s = time.monotonic() - self._heard_s
        base = self._job.groups[self._group].base.name if self._group is not None else ""
        if (self._task is not None or base) and silent_s >= self._next_word_s:
            self._next_word_s *= 2
            self._listen(Waiting(task=self._task, base=base, seconds=silent_s, limit_s=self._limit_s))

    def is_overdue(self) -> bool:
        """Whether what the child is at has taken longer than it may."""
        return time.monotonic() - self._began_s > self._limit_s

    @property
    def is_at_a_batch(self) -> bool:
        """Whether several adapters are being merged together: one at a time, the one at fault is found."""
        return bool(self._others)

    @property
    def is_at_an_adapter(self) -> bool:
        """Whether an adapter is being merged, which is then to blame for a death."""
        return self._task is not None

    @property
    def place(self) -> tuple[str, int]:
        """Where in the job the child is: the same place twice is no accident."""
        if self._group is not None:
            return "base", self._group
        return "between", len(self._open())

    def settle_death(self, ending: Ending) -> None:
        """Settle what died with the child."""
        late_s = self._limit_s if self.is_overdue() else None
        for index, what in self._lost():
            self._settled.add(index)
            refusal = _death(what, ending) if late_s is None else _late(f"{what}{self._progress}", late_s)
            self._listen(Undecided(task=index, refusal=refusal))

    def left(self, *, one_pass: bool = True) -> Job:
        """The job without what is settled; without `one_pass`, the adapters are merged one at a time."""
        groups = tuple(
            replace(
                group,
                one_pass=group.one_pass and one_pass,
                tasks=tuple(task for task in group.tasks if task.index not in self._settled),
            )
            for group in self._job.groups
        )
        return replace(self._job, groups=groups)

    def settle_rest(self) -> None:
        """Nothing may be missing from the report because nothing was said of it."""
        for index in self._open():
            why = "the gate's worker process finished without a word about this adapter"
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


def _death(what: str, ending: Ending) -> Refusal:
    again = "" if what == _MERGING else " twice"
    return NotJudged(message=f"the gate's worker process died{again} {what}: {ending.text}", hint=ending.hint)


def _late(what: str, limit_s: float) -> Refusal:
    return NotJudged(
        message=f"the gate's worker process was ended {what}: the time limit of {limit_s:g} s was over",
        hint="if the adapter or its base is large or the machine slow, set limits: {seconds: …} for the adapter",
    )
