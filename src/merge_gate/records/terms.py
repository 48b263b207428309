"""What all records share: the decorator `record`, `reported`, the enumerations, and small records such as `BaseKey`.

It imports only the standard library.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from enum import StrEnum
from typing import Any, TypeVar, dataclass_transform

_T = TypeVar("_T")


def reported(
    description: str, *, default: Any = MISSING, key: str | None = None, as_rows: bool = False, init: bool = True
) -> Any:
    """Declare a field of report.json with its description. `key` is its name there, if it differs.

    `as_rows`: the field is a tuple of many records, which are written as the rows of a table. `init` False: the record
    computes the field.
    """
    return field(default=default, init=init, metadata={"description": description, "key": key, "as_rows": as_rows})


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, reported))
def record(cls: type[_T]) -> type[_T]:
    """Make a class a frozen, slotted, keyword-only dataclass. All records are made by it."""
    return dataclass(frozen=True, slots=True, kw_only=True)(cls)


DTYPES = ("float32", "bfloat16", "float16")
"""Names of the dtypes that the config can request for a base, besides `auto`."""

PRESERVE = "preserve"
"""The dtype of a publication that keeps each tensor's stored dtype."""

AS_MERGED = "as-merged"
"""The dtype of merges that are only compared: each tensor has that of the merge."""


class FailureKind(StrEnum):
    """What a failure means."""

    BROKEN = "broken"
    REFUSED = "refused"
    NOT_MERGEABLE = "not-mergeable"
    UNEXPECTED = "unexpected"


class Severity(StrEnum):
    """The severity of a finding. An error fails the adapter. A note changes nothing."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"
    OFF = "off"


class Origin(StrEnum):
    """The place of a fault."""

    FILE = "file"
    CONFIG = "config"
    ADAPTER = "adapter"
    BASE = "base"
    MERGE = "merge"
    MODEL = "model"
    RUNTIME = "runtime"


class Verdict(StrEnum):
    """The verdict on one adapter."""

    PASSED = "passed"
    FAILED = "failed"
    ERROR = "error"


class Result(StrEnum):
    """The result of a run."""

    PASS = "pass"  # noqa: S105 - a verdict, not a password
    FAIL = "fail"
    ERROR = "error"


class Acceptance(StrEnum):
    """The outcome of one acceptance of a baseline."""

    USED = "used"
    EXPIRED = "expired"
    MORE = "fails otherwise too"
    UNBOUND = "names no base"
    UNMATCHED = "matches nothing"


class Quantization(StrEnum):
    """How the base is quantized when it is loaded."""

    NONE = "none"
    BNB_8BIT = "bnb-8bit"
    BNB_4BIT = "bnb-4bit"


class Access(StrEnum):
    """How the weights of a base on the Hub are read: downloaded, by ranges, or by ranges if the disk is too small."""

    AUTO = "auto"
    DOWNLOAD = "download"
    STREAM = "stream"


class ForwardMode(StrEnum):
    """Whether base and adapter are run as models: if it can matter, never, or without it there is no verdict."""

    AUTO = "auto"
    OFF = "off"
    REQUIRED = "required"


QUANTIZED_BY = {Quantization.BNB_8BIT: "bitsandbytes", Quantization.BNB_4BIT: "bitsandbytes"}
"""The package that quantizes."""


@record
class BaseKey:
    """The identity of a base in a run. One model in two dtypes is two bases.

    `model` is the name as written, or the directory if only the files matter.
    """

    model: str | None = reported("Directory or Hub id as written; null if it is unknown.")
    revision: str | None = reported("The commit that a Hub id was resolved to; null for a directory.")
    dtype: str = reported("The dtype that was checked, in torch's words.")
    quantization: str = reported(
        "How the loaded base is quantized: `none`, `bnb-8bit`, `bnb-4bit`, or the method that the base declares, such "
        "as `fp8`; for a base that was not loaded, what the config asks for."
    )

    @property
    def name(self) -> str:
        """The name of the base in messages."""
        return self.model or "unknown base"

    @property
    def is_quantized(self) -> bool:
        return self.quantization != Quantization.NONE

    def is_same_model(self, other: BaseKey) -> bool:
        """Whether both are one model at one revision, in any dtype and quantization."""
        return (self.model, self.revision) == (other.model, other.revision)


@record
class Finding:
    """One fact about an adapter or a base: what, where, got, expected (`message`), and what to do (`hint`).

    `measured` pairs a figure's name and its value (a share, a norm, a limit), for programs. `is_lesser`: no setting
    makes it more serious. It is not reported.
    """

    check: str = reported("Id of the check.")
    severity: Severity = reported(
        "`error` fails the adapter, `warning` does not; a `note` never changes the verdict or the exit code."
    )
    message: str = reported("What is wrong, where, what the gate got, and what it expected.")
    hint: str = reported("What to do about it; may be empty.", default="")
    url: str | None = reported(
        "The page of the check, or of an answer of verify; null until the project has an address.", default=None
    )
    module: str | None = reported("Module of the base.", default=None)
    tensor: str | None = reported("Tensor, with its name in the file or model.", default=None)
    origin: Origin = reported("The place of the fault.")
    nan: int | None = reported("How many values of the tensor are NaN.", default=None)
    posinf: int | None = reported("How many values of the tensor are +Infinity.", default=None)
    neginf: int | None = reported("How many values of the tensor are -Infinity.", default=None)
    numel: int | None = reported("How many values the tensor has.", default=None)
    first_index: tuple[int, ...] | None = reported("Index of the first non-finite value, row-major.", default=None)
    measured: tuple[tuple[str, float], ...] = reported(
        "The figures behind the finding, by name. If `estimated` is among them, they are from a sample. "
        'JSON has no infinities; they are written as the strings `"Infinity"`, `"-Infinity"` and `"NaN"`.',
        default=(),
    )
    log: str | None = reported(
        "The traceback of an unexpected exception, or the end of what a process printed that died; null otherwise.",
        default=None,
    )
    is_lesser: bool = False


class Likeness(StrEnum):
    """What the directory that adapter_config.json names is, next to the base of the run."""

    SAME = "same"
    ALIKE = "alike"
    OTHER_SETTINGS = "other settings"
    OTHER_FILES = "other files"
    OTHER_TYPE = "other type"


@record
class BaselineEntry:
    """One acceptance of the baseline, and its outcome in this run.

    It holds for any base if `base` is None: the digest of all weight files, in this `dtype` and `quantization`.
    """

    adapter: str = reported("Digest of the adapter's files, hex.")
    cause: str = reported("The check that decided.")
    also: tuple[str, ...] = reported("Other checks that may fail the adapter.", default=())
    reason: str = reported("Why it is accepted.")
    owner: str = reported("Who is responsible for it.")
    until: str = reported("The last day on which it is accepted.")
    outcome: Acceptance = reported(
        "`used`; `expired`: its last day is over; `fails otherwise too`: another check failed that it does not name; "
        "`names no base`, which the cause needs; `matches nothing` in this run."
    )
    line: int = reported("Its line in the baseline file, counted from 1.")
    base: str | None = None
    dtype: str | None = None
    quantization: str | None = None
