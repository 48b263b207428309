"""The supervisor of the worker process: it outlives the child, and settles what dies with it.

In: a `Job` of groups, one group per base. Out: events, in order; every task gets exactly one `Merged` or `Undecided`.
Imports no torch.

1. The parent starts a child and sends the job. 2. The child sends events until `Finished`. 3. If it dies before, the
adapter under way is `error` (while a base was loading: all of that base), and a new child goes on with the rest.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from merge_gate.engine.process import WorkerProcess
from merge_gate.engine.protocol import (
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
    Undecided,
)
from merge_gate.records import Quantization, Refusal


def supervise(job: Job, listen: Listener, child: WorkerProcess | None = None) -> None:
    """Run a job to its end. Every task gets exactly one `Merged` or `Undecided`, whatever happens to the child.

    `child` is one that was started before the job was known, so that its imports are done by now.
    """
    while any(group.tasks for group in job.groups):
        attempt = Attempt(job, listen)
        quantizes = any(group.quantization is not Quantization.NONE for group in job.groups)
        with child or WorkerProcess(quantizes=quantizes) as running:
            exit_text = running.run(job, attempt.receive)
        child = None
        if exit_text is None:
            attempt.settle_rest()
            return
        job = attempt.settle_death(exit_text)


class Attempt:
    """What one child has said of a job, so that it is known what its death costs."""

    def __init__(self, job: Job, listen: Listener) -> None:
        self._job = job
        self._listen = listen
        self._settled: set[int] = set()
        self._task: int | None = None
        self._group: int | None = None

    def receive(self, event: Event) -> None:
        """Note what the child is at, and pass the event on."""
        match event:
            case BaseLoading():
                self._group, self._task = event.group, None
            case BaseLoaded():
                self._group = None
            case MergeStarted():
                self._task = event.task
            case Merged() | Undecided():
                self._settled.add(event.task)
                self._task = None
            case DeviceChosen() | MergeProgressed() | Finished() | Idle():
                pass
            case _:
                assert_never(event)
        self._listen(event)

    def settle_death(self, exit_text: str) -> Job:
        """Settle what died with the child; return the job that is left."""
        for index, what in self._lost():
            self._settled.add(index)
            self._listen(Undecided(task=index, refusal=_death(what, exit_text)))
        left = tuple(
            replace(group, tasks=tuple(task for task in group.tasks if task.index not in self._settled))
            for group in self._job.groups
        )
        return replace(self._job, groups=left)

    def settle_rest(self) -> None:
        """Nothing may be missing from the report because nothing was said of it."""
        for index in self._open():
            why = "the gate's worker process finished without a word about this adapter"
            self._listen(Undecided(task=index, refusal=Refusal(check=None, message=why, hint="please report this")))

    def _open(self) -> list[int]:
        every = (task.index for group in self._job.groups for task in group.tasks)
        return [index for index in every if index not in self._settled]

    def _lost(self) -> list[tuple[int, str]]:
        if self._task is not None:
            return [(self._task, "while it merged this adapter")]
        if self._group is not None:
            group = self._job.groups[self._group]
            what = f"while it loaded base {group.label}"
            return [(task.index, what) for task in group.tasks if task.index not in self._settled]
        if self._settled:  # it died between two adapters: a new child goes on, and this cannot go on forever
            return []
        return [(index, "before it judged this adapter") for index in self._open()]


def _death(what: str, exit_text: str) -> Refusal:
    return Refusal(
        check=None,
        message=f"the gate's worker process died {what}: {exit_text}",
        hint="if it was killed for memory, use a larger runner or gate this adapter alone; else report it as a bug",
    )
