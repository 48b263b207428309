"""What the run and its worker process say to each other: one `Job` there, events back.

In: nothing but records. Out: picklable records. Both sides import it; torch is not imported here.
"""

from __future__ import annotations

from collections.abc import Callable

from merge_gate.records.config import Combine
from merge_gate.records.files import AdapterFiles, BaseFiles, FileIdentity
from merge_gate.records.measured import NO_LEEWAY, BaseFacts, Evidence, Leeway
from merge_gate.records.refusals import Refusal
from merge_gate.records.report import Sandbox
from merge_gate.records.terms import BaseKey, record

DEFAULT_LIMIT_S = 600.0
"""What importing, or a base of no size, may take."""


@record
class Task:
    """One adapter (or combination: `combine` is set, `files` are the members') to merge. `index` is the caller's.

    `leeway` is that of `merge.merge_adapter`. `limit_s` is what the load of its base may take, and its merge.
    """

    index: int
    files: tuple[AdapterFiles, ...]
    combine: Combine | None = None
    leeway: Leeway = NO_LEEWAY
    limit_s: float = DEFAULT_LIMIT_S


@record
class Group:
    """Adapters on one base. `files` is what the base's files say, if they were read.

    `one_pass`: the base is larger than the memory, so several adapters are merged in one pass over its files.
    """

    base: BaseKey
    directory: str
    files: BaseFiles | None = None
    one_pass: bool = False
    tasks: tuple[Task, ...]


@record
class Job:
    """Everything one run merges."""

    groups: tuple[Group, ...]
    device: str = "auto"
    allow_pickle: bool = False
    trust_remote_code: bool = False


# --- events --------------------------------------------------------------------------------------------------------


@record
class DeviceChosen:
    """The child has its device, and what it gave up."""

    device: str
    device_name: str
    sandbox: Sandbox = Sandbox()


@record
class BaseLoading:
    """`group` is a position in `Job.groups`."""

    group: int


@record
class BaseLoaded:
    """`facts` is what was measured of the base, `identity` that of its files before they were read.

    `task` is the first that will be merged into it.
    """

    group: int
    task: int
    facts: BaseFacts
    identity: tuple[FileIdentity, ...] = ()
    seconds: float


@record
class MergeStarted:
    """The task's adapter is being loaded and merged; `others` are tasks that are merged in the same pass."""

    task: int
    others: tuple[int, ...] = ()


@record
class MergeProgressed:
    """`done` of `total` modules are merged, `module` is next."""

    task: int
    done: int
    total: int
    module: str


@record
class Merged:
    """A task with what was measured of it."""

    task: int
    evidence: Evidence


@record
class Undecided:
    """A task that could not be judged."""

    task: int
    refusal: Refusal


@record
class Finished:
    """Every task has been settled."""


@record
class Waiting:
    """The task has said nothing for so long, or `base` has been loading for so long; the parent tells it itself."""

    task: int | None
    base: str
    seconds: float
    limit_s: float


@record
class Idle:
    """The child has said nothing for a while; the parent tells it itself."""


Event = (
    DeviceChosen
    | BaseLoading
    | BaseLoaded
    | MergeStarted
    | MergeProgressed
    | Merged
    | Undecided
    | Finished
    | Waiting
    | Idle
)
Listener = Callable[[Event], None]
