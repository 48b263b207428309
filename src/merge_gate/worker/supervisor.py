"""Owns the worker process, and decides what its death or a time limit costs.

In: a `Job`, with one group for each base. Out: events, in order. Every task gets exactly one `Merged` or `Unjudged`.

1. A process gets the job, and sends events until `Finished`. It runs child.py in its own interpreter, so a crash in a
   native library does not reach this one. If a base's code may run, each base has a process of its own.
2. If it dies or exceeds a time limit while it merges an adapter, that adapter is `error`. A new process continues.
3. If it dies elsewhere (imports, the load of a base, between two adapters), a new process tries the same again, once.
   Then the adapters that waited for it are `error`. A load that exceeds its limit is not tried again.
4. If it dies or exceeds its time limit while it merges several adapters in one pass, a new process merges them in two
   passes: the adapters that were not in progress, and then those that were. If none was, the first pass has one
   adapter, and the second one the others. After a death in the pass of those in progress, or a second one without any,
   each adapter of the pass gets one of its own. So one death costs at most two more reads of the base.
5. If it dies or exceeds a time limit while adapters run as models, a new process runs their base alone, and then each
   of them. A base that dies alone is not run any more, and neither is an adapter.

The process may be in the hands of a base's own code, or of a defect in a library. It has no token and no network. It
can forge evidence on its own base; events on other bases, and those that name another base, are refused. All that it
does with a base has one time limit, which no event moves. The caller's directory is never on its
`sys.path`: a config that names a module must not find the checkout.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, assert_never

from merge_gate._internal.errors import EngineError, GateError
from merge_gate._internal.text import counted, quoted
from merge_gate.records.files import StoredTensor
from merge_gate.records.measured import BaseFacts
from merge_gate.records.refusals import NotJudged, Refusal
from merge_gate.records.terms import BaseKey
from merge_gate.worker import protocol
from merge_gate.worker.encoding import GarbledError
from merge_gate.worker.process import WorkerProcess, late
from merge_gate.worker.protocol import ALONE, DEFAULT_TIMEOUT_S, SUSPECTED, Event, Job, Listener, Task

if TYPE_CHECKING:
    from merge_gate.worker.call_service import Service

FIRST_NOTE_S = 60.0
"""A note names an adapter or a loading base after so long without an event, and again after twice as long."""

FORWARD_SHARE = 2
"""The model of an adapter may run for half of the time limit of its merge, also together with others."""

MOST_STARTS, MOST_THREADS = 2, 1024
"""A process sends each event of `_SHOWN` at most so many times for each adapter, and has at most so many threads."""

_SHOWN = (
    protocol.DeviceChosen | protocol.BaseLoading | protocol.BaseLoaded | protocol.BaseMeasured | protocol.MergeStarted
)
"""The parent prints or keeps something for each of these events. Of the others, it keeps the last one."""

Services = Sequence[Callable[[Job], "Service | None"]]
"""What answers calls of the worker, for each of its processes with a job. None: the job asks for no such calls."""


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

    def start(self) -> WorkerProcess:
        """Start the process, unless there is one."""
        if self._process is None:
            self._process = WorkerProcess()
        return self._process

    def run(self, attempt: Attempt, services: Services = ()) -> NotJudged | None:
        """Run a job in the process. None if it finished, or how the process ended."""
        try:
            return self.start().run(attempt, services)
        finally:
            self.end()

    def read_pickle(self, path: str) -> tuple[StoredTensor, ...] | Refusal:
        """The tensors of a pickled file, as torch's restricted unpickler lists them in the process, or why it refuses.

        Raises:
            EngineError: the process died, or took too long.
        """
        listed = self.start().read_pickle(path)
        if isinstance(listed.refusal, NotJudged):
            self.end()
            message = f"{quoted(Path(path).name, 120)} could not be read: {listed.refusal.message}"
            raise EngineError(message, hint=listed.refusal.hint)
        return listed.refusal or listed.tensors

    def choose_device(self, requested: str) -> protocol.DeviceChosen | None:
        """The device that torch would choose for `requested`, and its name. None if the process fails."""
        events: list[Event] = []
        self.run(Attempt(Job(groups=(), device=requested), events.append))
        return next((event for event in events if isinstance(event, protocol.DeviceChosen)), None)

    def end(self) -> None:
        """End the process, whatever it does. May be called more than once."""
        if self._process is not None:
            self._process.close()
        self._process = None


def supervise(job: Job, listen: Listener, worker: WorkerSlot, services: Services = ()) -> None:
    """Run a job to its end. Every task gets exactly one `Merged` or `Unjudged`, whatever happens to the process.

    `worker` may hold a process that was started before the job was known. `services` answer its calls.
    """
    for part in _parts(job):
        remaining, tried, bases = part, set[tuple[str, object]](), dict[int, BaseKey]()
        while any(group.tasks for group in remaining.groups):
            attempt = Attempt(remaining, listen, bases=bases)
            ending = worker.run(attempt, services)
            if ending is None:
                attempt.report_rest()
                break
            remaining = attempt.remaining_job(ending, tried)


def _parts(job: Job) -> Iterator[Job]:
    """What one process may do of a job: if a base's code may run, the tasks of one base."""
    if not job.trust_remote_code:
        yield job
        return
    for directory in dict.fromkeys(group.directory for group in job.groups):
        groups = (group if group.directory == directory else replace(group, tasks=()) for group in job.groups)
        yield replace(job, groups=tuple(groups))


def _limits_s(job: Job) -> dict[str | None, float]:
    """What all loads, merges, and runs of models on each base may take together, in one process.

    A base may be loaded once for each adapter, because each may ask for another class. After a pass that fails, its
    adapters are merged again.
    """
    limits_s: dict[str | None, float] = {}
    for group in job.groups:
        timeouts_s, merges = [task.timeout_s for task in group.tasks], 2 if group.in_passes else 1
        loads_s = len(timeouts_s) * max(timeouts_s, default=0.0)
        limit_s = loads_s + merges * (1 + 1 / FORWARD_SHARE) * sum(timeouts_s)
        limits_s[group.directory] = limits_s.get(group.directory, 0.0) + limit_s
    return limits_s


class Attempt:
    """The events of one process on a job, which say what its death costs.

    `bases` are the bases that groups turned out to be, with dtype and quantization: the first event on one decides.
    """

    def __init__(
        self,
        job: Job,
        listen: Listener,
        clock: Callable[[], float] = time.monotonic,
        bases: dict[int, BaseKey] | None = None,
    ) -> None:
        self.job, self._listen, self._clock = job, listen, clock
        self._bases = bases if bases is not None else {}
        self._open = {task.index: (number, task) for number, group in enumerate(job.groups) for task in group.tasks}
        self._most_shown, self._shown = MOST_STARTS * max(1, len(self._open)), Counter[type]()
        self._base_runs = [group.base_run for group in job.groups]
        self._limits_s = _limits_s(job)
        self._directory: str | None = None  # of the base in progress
        self._loading: int | None = None
        self._merging: tuple[int, ...] = ()
        self._in_progress: dict[int | None, int] = {}  # by thread
        self._entered_s, self._spent_s = clock(), dict[str | None, float]()
        self._begin(DEFAULT_TIMEOUT_S)

    def _begin(self, timeout_s: float) -> None:
        self._timeout_s, self._progress = timeout_s, ""
        self._began_s = self._last_event_s = self._clock()
        self._next_note_s = FIRST_NOTE_S
        self._running: set[int] = set()  # tasks whose models run
        self._running_since_s = 0.0

    def receive(self, event: Event) -> None:
        """Record what the process does now, and pass the event on.

        Raises:
            GarbledError: the event is not about open tasks of the base in progress, or nothing can be made of it.
        """
        ended = self._open.get(event.task) if isinstance(event, protocol.Merged | protocol.Unjudged) else None
        try:
            event = self._recorded(event)
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise GarbledError(f"{type(event).__name__}: {str(error)[:200]}") from error
        try:
            self._listen(event)
        except (GateError, OSError):  # of the run itself
            raise
        except Exception as error:
            if ended is not None:
                self._open[ended[1].index], self._merging = ended, (ended[1].index,)
            raise GarbledError(f"{type(event).__name__}: {type(error).__name__}: {str(error)[:200]}") from error

    def _recorded(self, event: Event) -> Event:  # noqa: C901 - a case for each event
        if not self._is_fit(event):
            raise GarbledError(f"{type(event).__name__} of an adapter that is not in progress")
        self._count(event)
        match event:
            case protocol.BaseLoading():
                self._enter(self.job.groups[event.group].directory)
                self._loading, self._merging = event.group, ()
                self._begin(max(task.timeout_s for task in self.job.groups[event.group].tasks))
            case protocol.BaseLoaded():
                self._loading = None
                self._begin(DEFAULT_TIMEOUT_S)
            case protocol.MergeStarted():
                self._merging, self._in_progress = (event.task, *event.others), {}
                self._begin(sum(self._open[index][1].timeout_s for index in self._merging))
            case protocol.InProgress():
                self._note_thread(event)
            case protocol.MergeProgressed():
                self._progress = (
                    f" (at {event.done:,} of {counted(event.total, 'module')}, {quoted(event.module, 200, mark='')})"
                )
                self._last_event_s, self._next_note_s = self._clock(), FIRST_NOTE_S
            case protocol.ForwardRunning():
                self._note_forward(event)
            case protocol.Merged() | protocol.Unjudged():
                del self._open[event.task]
                self._loading = None  # no base is loading any more
                self._merging = tuple(index for index in self._merging if index in self._open)
                self._begin(sum(self._open[index][1].timeout_s for index in self._merging) or DEFAULT_TIMEOUT_S)
            case protocol.Idle():
                event = self._silence()
            case protocol.DeviceChosen() | protocol.BaseMeasured() | protocol.Finished():
                pass
            case _:
                assert_never(event)
        return event

    def _note_thread(self, event: protocol.InProgress) -> None:
        if event.thread is None:
            self._in_progress.clear()
        for thread in (None, event.thread, *[*self._in_progress][: 1 - MOST_THREADS]):
            self._in_progress.pop(thread, None)
        self._in_progress[event.thread] = event.task

    def _count(self, event: Event) -> None:
        if isinstance(event, _SHOWN):
            self._shown[type(event)] += 1
            if self._shown[type(event)] > self._most_shown:
                raise GarbledError(f"more than {self._most_shown:,} of {type(event).__name__}")

    def _enter(self, directory: str) -> None:
        """A base is loaded, perhaps again, as another class or in another dtype. Its time adds up."""
        if directory != self._directory:
            now_s = self._clock()
            self._spent_s[self._directory] = self._spent_s.get(self._directory, 0.0) + now_s - self._entered_s
            self._directory, self._entered_s = directory, now_s

    def _is_fit(self, event: Event) -> bool:
        """Whether an event is about open tasks of the base in progress, or about no task."""
        match event:
            case protocol.Finished() | protocol.Idle():
                is_fit = True
            case protocol.DeviceChosen():
                is_fit = self._directory is None  # afterwards, code of a base may run
            case protocol.BaseLoading():
                is_fit = bool(self._tasks_of(event.group))
            case protocol.BaseLoaded() | protocol.BaseMeasured():
                is_fit = self._is_of_base(event.task) and event.group == self._open[event.task][0]
                is_fit = is_fit and self._is_base(event.group, event.facts)
            case protocol.Merged():
                is_fit = self._is_of_base(event.task) and self._is_base(self._open[event.task][0], event.evidence.base)
            case protocol.MergeStarted():
                is_fit = all(map(self._is_of_base, (event.task, *event.others))) and self._are_one_pass(event)
            case protocol.ForwardRunning():
                is_fit = self._is_of_base(event.task) and self._open[event.task][1].no_forward == ""
            case protocol.Unjudged() if self._directory is None:  # without a device, no base is loaded
                is_fit = event.task in self._open
            case _:
                is_fit = self._is_of_base(event.task)
        return is_fit

    def _are_one_pass(self, event: protocol.MergeStarted) -> bool:
        """Whether the job lets these adapters be merged together. So a pass that dies is another one each time."""
        turns = {self._open[index][1].turn for index in (event.task, *event.others)}
        return not event.others or (len(turns) == 1 and ALONE not in turns)

    def _is_of_base(self, index: int) -> bool:
        return index in self._open and self.job.groups[self._open[index][0]].directory == self._directory

    def _is_base(self, number: int, facts: BaseFacts) -> bool:
        """Whether a process may say this of the base of a group."""
        if number not in self._bases and self.job.groups[number].allows(facts):
            self._bases[number] = facts.key
        if self._bases.get(number) != facts.key:
            raise ValueError(f"not the base {self.job.groups[number].base.name} as the job asks for it")
        return True

    def _note_forward(self, event: protocol.ForwardRunning) -> None:
        """The time of the models does not count as the merge's."""
        now_s = self._clock()
        if event.is_running:
            self._running_since_s = self._running_since_s if self._running else now_s
            self._running.add(event.task)
            self._progress = ""
            return
        self._base_runs[self._open[event.task][0]] = "ran"
        self._running.discard(event.task)
        if not self._running:
            self._began_s += now_s - self._running_since_s

    def _silence(self) -> protocol.Idle:
        silent_s = self._clock() - self._last_event_s
        base = self.job.groups[self._loading].base.name if self._loading is not None else ""
        task = self._merging[0] if self._merging else None
        if (task is None and not base) or silent_s < self._next_note_s:
            return protocol.Idle()
        self._next_note_s *= 2
        return protocol.Idle(task=task, base=base, seconds=silent_s, timeout_s=self._timeout_of_now())

    def _timeout_of_now(self) -> float:
        return min((self._open[index][1].timeout_s / FORWARD_SHARE for index in self._running), default=self._timeout_s)

    def is_overdue(self) -> bool:
        """Whether what the process does now exceeds its time limit. A merge and the models have limits of their own."""
        return self._exceeded_s() is not None

    def _exceeded_s(self) -> float | None:
        """The time limit that is over: that of what the process does now, or that of the base, which no event moves."""
        began_s, now_s = self._running_since_s if self._running else self._began_s, self._clock()
        if now_s - began_s > self._timeout_of_now():
            return self._timeout_of_now()
        limit_s = self._limits_s.get(self._directory, math.inf)
        spent_s = self._spent_s.get(self._directory, 0.0) + now_s - self._entered_s
        return limit_s if spent_s > limit_s else None

    def refuse(self, index: int, refusal: NotJudged) -> None:
        """Report a task that the process does not get."""
        self._report([index], refusal)
        groups = (replace(group, tasks=self._tasks_of(number)) for number, group in enumerate(self.job.groups))
        self.job = replace(self.job, groups=tuple(groups))

    # --- the end of the process --------------------------------------------------------------------------------------

    def report_rest(self) -> None:
        """Report that tasks without a result could not be judged, so that none is missing in the report."""
        why = "the gate's worker process finished without a result for this adapter"
        self._report(list(self._open), NotJudged(message=why, hint="please report this"))

    def remaining_job(self, ending: NotJudged, tried: set[tuple[str, object]]) -> Job:
        """The job for the next process. This one died so. `tried` are the places where a process died before."""
        place = ("base", self._loading) if self._loading is not None else ("between", len(self._open))
        if self._running:
            self._end_forward(ending)  # 5
        elif len(self._merging) > 1:
            self._divide_pass(tried)  # 4
        elif self._merging or place in tried or self.is_overdue():
            self._report_death(ending)  # 2
        else:
            tried.add(place)  # 3
        groups = (
            replace(group, base_run=self._base_runs[number], tasks=self._tasks_of(number))
            for number, group in enumerate(self.job.groups)
        )
        return replace(self.job, groups=tuple(groups))

    def _tasks_of(self, number: int) -> tuple[Task, ...]:
        return tuple(task for position, task in self._open.values() if position == number)

    def _change(self, indices: Iterable[int], **changes: Any) -> None:
        for index in indices:
            number, task = self._open[index]
            self._open[index] = number, replace(task, **changes)

    def _end_forward(self, ending: NotJudged) -> None:
        """Note what the next process does not run as a model, and what it runs alone."""
        lost, what = list(self._running), "while it ran the model"
        number = self._open[lost[0]][0]
        base_run = self._base_runs[number]
        if base_run == "alone":
            lost = [task.index for task in self._tasks_of(number) if task.no_forward == ""]
            what = "while it ran the base, without an adapter"
            for index in lost:
                self._listen(protocol.ForwardRunning(task=index, is_running=True))
        elif not base_run or any(self._open[index][1].turn != ALONE for index in lost[1:]):
            self._base_runs[number] = base_run or "alone"
            self._change(lost, turn=ALONE)
            return
        for index in lost:
            number, task = self._open[index]
            self._open[index] = number, replace(task, no_forward=task.no_forward or self._why(what, ending).message)

    def _divide_pass(self, tried: set[tuple[str, object]]) -> None:
        """Step 4: what the next process merges together, after a pass has died."""
        suspects = set(self._in_progress.values()).intersection(self._merging)
        place = ("pass", self._directory)
        if self._open[self._merging[0]][1].turn == SUSPECTED or (not suspects and place in tried):
            self._change(self._merging, turn=ALONE)
        elif suspects:
            self._change(suspects, turn=SUSPECTED)
        else:
            self._change(self._merging[:1], turn=ALONE)
            tried.add(place)

    def _report_death(self, ending: NotJudged) -> None:
        """Report that the tasks that the death costs could not be judged."""
        lost, what = list(self._open), "before it came to this adapter"
        if self._merging:
            lost, what = list(self._merging), "while it merged this adapter"
        elif self._loading is not None:
            lost = [task.index for task in self._tasks_of(self._loading)]
            what = f"while it loaded base {self.job.groups[self._loading].base.name}"
        self._report(lost, self._why(what, ending))

    def _report(self, indices: Sequence[int], refusal: NotJudged) -> None:
        for index in indices:
            del self._open[index]
            self._listen(protocol.Unjudged(task=index, refusal=refusal))

    def _why(self, what: str, ending: NotJudged) -> NotJudged:
        if (limit_s := self._exceeded_s()) is not None:
            return late(what + self._progress, limit_s)
        again = "" if self._merging else " twice"
        return replace(ending, message=f"the gate's worker process died{again} {what}: {ending.message}")
