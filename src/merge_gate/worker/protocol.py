"""The messages between a run and its worker process: one `Job` to the worker, events back.

All are records. Both sides import this module; it imports no torch.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from merge_gate._internal.errors import EngineError
from merge_gate.records.config import Combine
from merge_gate.records.files import AdapterFiles, BaseFiles, FileIdentity, StoredTensor
from merge_gate.records.measured import MEASURE_ALL, BaseFacts, Evidence, MeasureOptions
from merge_gate.records.refusals import CannotJudge, Caught, NotJudged, Refusal, log_of
from merge_gate.records.report import Sandbox
from merge_gate.records.terms import DTYPES, BaseKey, Quantization, record

DEFAULT_TIMEOUT_S = 600.0
"""The time limit of the imports, and of a load or merge of a tiny base."""

ALONE, TOGETHER, SUSPECTED = range(3)
"""How a pass merges an adapter: by itself, with the others, or with those that were in progress with it when a pass
died. The passes have this order."""

PACKED = {"bitsandbytes_4bit": Quantization.BNB_4BIT, "bitsandbytes_8bit": Quantization.BNB_8BIT}
"""The methods that bitsandbytes declares, and how the loaded base is quantized."""

_FLOATS = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
"""safetensors' names of the dtypes that a model can have, and torch's."""


@record
class ConsumerSpec:
    """A feature that takes part in a merge (engine/consumer.py), with `settings` of its own.

    It has about so many `files` open, none above `most_bytes`. `plain_dtype`: it needs a quantized base with plain
    weights in this dtype.
    """

    feature: str
    settings: Any = None
    files: int = 0
    most_bytes: int = 0
    plain_dtype: str | None = None


@record
class Task:
    """One adapter to merge, or a combination: then `combine` is set, and `files` has an item for each member.

    `index` identifies the task in events. `measure_options` says what need not be measured. `timeout_s` is the time
    limit of its merge, and of the load of its base. `turn` is `ALONE`, `TOGETHER`, or `SUSPECTED`. `consumers` take
    part in the merge, in this order. `no_forward` says why base and adapter are not run as models; it is empty if they
    are, and None if nothing asks for it.
    """

    index: int
    files: tuple[AdapterFiles, ...]
    combine: Combine | None = None
    measure_options: MeasureOptions = MEASURE_ALL
    timeout_s: float = DEFAULT_TIMEOUT_S
    turn: int = TOGETHER
    consumers: tuple[ConsumerSpec, ...] = ()
    no_forward: str | None = None

    @property
    def model_files(self) -> int:
        """How many files of models its consumers have open."""
        return sum(consumer.files for consumer in self.consumers)

    def with_consumer(self, consumer: ConsumerSpec) -> Task:
        """The task with one more feature, the last that takes part."""
        return replace(self, consumers=(*self.consumers, consumer))


@record
class Group:
    """The adapters on one base. `files` is what the base's files contain.

    `one_pass`: nothing of the base's files stays in memory, because it is streamed or larger than the memory. `fed`:
    the parent reads its weight files (features/stream). `base_run`: what is known of the base as a model, after a
    process died that ran it with adapters. It is `alone` if it has to run without them first, and `ran` if it can.
    """

    base: BaseKey
    directory: str
    files: BaseFiles
    one_pass: bool = False
    fed: bool = False
    base_run: str = ""
    tasks: tuple[Task, ...]

    def allows(self, facts: BaseFacts) -> bool:
        """Whether a base that a worker has loaded can be this one, by what the job asks for and its files have."""
        if (facts.model, facts.revision) != (self.base.name, self.base.revision):
            return False
        return self._allows_quantization(facts.quantization) and self._allows_dtype(facts)

    def _allows_quantization(self, loaded: str) -> bool:
        declared = self.files.quantization
        if self.base.is_quantized or declared is None:
            return loaded == self.base.quantization
        allowed = {Quantization.NONE, PACKED.get(declared.method, declared.method), declared.method.replace("-", "_")}
        return allowed.issuperset(loaded.split(", "))

    def _allows_dtype(self, facts: BaseFacts) -> bool:
        asked, declared = self.base.dtype, self.files.quantization
        if asked != "auto" and declared is None:  # a class may keep most of its parameters in another one
            return asked in {facts.dtype, *(dtype for dtype, _ in facts.dtypes)} or facts.dtype == self.plain_dtype
        stored = {_FLOATS[tensor.dtype] for tensor in self.files.tensors if tensor.dtype in _FLOATS}
        named = {*stored, *self.files.config_dtypes}
        is_open = self.base.is_quantized or declared is not None or not stored  # pickled weights have no headers
        return facts.dtype in named | ({*DTYPES, self.plain_dtype} if is_open else {"float32"})

    @property
    def in_passes(self) -> bool:
        """Whether several adapters are merged in one pass over the base's files."""
        return self.one_pass or self.fed

    @property
    def plain_dtype(self) -> str | None:
        """The dtype in which all tasks need a quantized base with plain weights. None if they do not.

        The merges are then judged without its quantization. No other run asks for such a verdict, so it is not cached.
        """
        declared = self.files.quantization
        is_stored_packed = declared is not None and declared.method in PACKED
        dtypes = {
            next((consumer.plain_dtype for consumer in task.consumers if consumer.plain_dtype), None)
            for task in self.tasks
        }
        if len(dtypes) != 1 or not (self.base.is_quantized or is_stored_packed):
            return None
        return dtypes.pop()


@record
class Job:
    """Everything that one run merges."""

    groups: tuple[Group, ...]
    device: str = "auto"
    allow_pickle: bool = False
    trust_remote_code: bool = False


# --- before the job --------------------------------------------------------------------------------------------------


@record
class PickleNamed:
    """To the worker: list the tensors of this pickled file. It answers with `PickleListed`."""

    path: str


@record
class PickleListed:
    """The tensors of a pickled file, or why it has none."""

    tensors: tuple[StoredTensor, ...] = ()
    refusal: Refusal | NotJudged | None = None


# --- events --------------------------------------------------------------------------------------------------------


@record
class DeviceChosen:
    """The worker's device, and what its sandbox holds."""

    device: str
    device_name: str
    sandbox: Sandbox = Sandbox()


@record
class BaseLoading:
    """The load of a base begins. `group` is a position in `Job.groups`."""

    group: int


@record
class BaseLoaded:
    """A base is loaded. `facts` are its measurements, and `identity` is that of its files before they were read.

    `task` is the first task that is merged into it. `measured` False: the values are measured while the first adapters
    are merged, so the facts are not final. `BaseMeasured` follows with those.
    """

    group: int
    task: int
    facts: BaseFacts
    identity: tuple[FileIdentity, ...] = ()
    measured: bool = True
    seconds: float


@record
class BaseMeasured:
    """The base is measured, in the pass of its first adapters. `task` is one of its tasks."""

    group: int
    task: int
    facts: BaseFacts


@record
class MergeStarted:
    """The task's adapter is being loaded and merged; `others` are tasks that are merged in the same pass."""

    task: int
    others: tuple[int, ...] = ()


@record
class InProgress:
    """In a pass over several adapters, the worker begins to work on this one.

    `thread` identifies the thread that does, until it sends the next of these events. None: no other thread works now.
    """

    task: int
    thread: int | None = None


@record
class MergeProgressed:
    """`done` of `total` modules are merged, `module` is next."""

    task: int
    done: int
    total: int
    module: str


@record
class ForwardRunning:
    """The task's adapter and its base begin to run as models, or have ended that. In a pass, each task has its own."""

    task: int
    is_running: bool


@record
class Merged:
    """A task and its measurements."""

    task: int
    evidence: Evidence


@record
class Unjudged:
    """A task that could not be judged."""

    task: int
    refusal: Refusal | NotJudged


@record
class Finished:
    """Every task has its `Merged` or `Unjudged`."""


@record
class Idle:
    """The worker sent nothing for a while. The parent makes this event.

    With a `timeout_s`, that is long: the task sent nothing for so many seconds, or `base` has been loading for so many.
    """

    task: int | None = None
    base: str = ""
    seconds: float = 0.0
    timeout_s: float = 0.0


Sent = (
    DeviceChosen
    | BaseLoading
    | BaseLoaded
    | BaseMeasured
    | MergeStarted
    | InProgress
    | MergeProgressed
    | ForwardRunning
    | Merged
    | Unjudged
    | Finished
)
Event = Sent | Idle
Listener = Callable[[Event], None]


def undecided(tasks: Iterable[Task], error: Exception, group: Group | None = None) -> Iterator[Unjudged]:
    """An exception as the reason why these tasks could not be judged."""
    refusal = refusal_of(error, group)
    return (Unjudged(task=task.index, refusal=refusal) for task in tasks)


def _is_of_an_import(error: Exception) -> bool:
    """Whether Python raised the error while it imported a module."""
    frames = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(name.startswith("<frozen importlib") for name in frames)


def refusal_of(error: Exception, group: Group | None = None) -> Refusal | NotJudged:
    """The fact behind an exception. A base has the name that the configuration uses."""
    if isinstance(error, CannotJudge):
        return _with_label(error.refusal, group) if group is not None else error.refusal
    if isinstance(error, EngineError):
        message = error.message if group is None else error.message.replace(group.directory, group.base.name)
        return NotJudged(message=message, hint=error.hint)
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    kinds = tuple(kind.__name__ for kind in type(error).__mro__)
    caught = Caught(kinds=kinds, text=text[:400], log=log_of(error))
    return CannotJudge("worker_raised", error=caught, in_import=_is_of_an_import(error)).refusal


def _with_label(refusal: Refusal, group: Group) -> Refusal:
    """The fact with the base's name in place of its directory, which is open under another path."""
    error = refusal.fields.get("error")
    if not isinstance(error, Caught):
        return refusal
    named = replace(error, text=error.text.replace(group.directory, group.base.name))
    return replace(refusal, fields={**refusal.fields, "error": named})


# --- calls of features (call_service.py) ----------------------------------------------------------------------------


@record
class Answer:
    """To the worker: the call was carried out, or `refusal` says why not. So many open `files` come with it."""

    refusal: NotJudged | None = None
    files: int = 0
