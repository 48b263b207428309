"""The values that travel between the stages, in the order of the flow.

In: nothing but the standard library. Out: frozen, slotted, keyword-only dataclasses of hashable fields, so that
they can be pickled to a worker, compared and cached. They hold no logic beyond what follows from their own fields.

Where a field has `told`, the record is part of report.json, and the sentence is the field's description: the file, its
JSON Schema, the tables of docs/report.md and the reader are all made from it (report/document.py).
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, replace
from enum import StrEnum
from typing import Any, TypeVar, dataclass_transform

_T = TypeVar("_T")


def told(sentence: str, *, default: Any = MISSING, key: str | None = None, as_rows: bool = False) -> Any:
    """A field that report.json has, and what is said of it; `key` where its name there is another.

    `as_rows`: a tuple of many records, which are written as the rows of a table.
    """
    return field(default=default, metadata={"told": sentence, "key": key, "as_rows": as_rows})


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, told))
def record(cls: type[_T]) -> type[_T]:
    """The one kind of class in this module: a frozen, slotted, keyword-only dataclass."""
    return dataclass(frozen=True, slots=True, kw_only=True)(cls)


DTYPES = ("float32", "bfloat16", "float16")
"""Names of the dtypes that a base can be asked for, beside `auto`."""


class Severity(StrEnum):
    """How much a finding weighs: an error fails the adapter."""

    ERROR = "error"
    WARNING = "warning"
    OFF = "off"


class Origin(StrEnum):
    """Where the cause of a finding lies."""

    FILE = "file"
    CONFIG = "config"
    ADAPTER = "adapter"
    BASE = "base"
    MERGE = "merge"
    RUNTIME = "runtime"


class Verdict(StrEnum):
    """What is said of one adapter."""

    PASSED = "passed"
    FAILED = "failed"
    ERROR = "error"


class Result(StrEnum):
    """What is said of a run."""

    PASS = "pass"  # noqa: S105 - a verdict, not a password
    FAIL = "fail"
    ERROR = "error"


class Quantization(StrEnum):
    """How the base is quantised when it is loaded."""

    NONE = "none"
    BNB_8BIT = "bnb-8bit"
    BNB_4BIT = "bnb-4bit"


# --- configuration -------------------------------------------------------------------------------------------------


@record
class Problem:
    """One thing wrong with the configuration. `line` and `column` count from 1."""

    message: str
    path: str
    line: int
    column: int
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.path}:{self.line}:{self.column}: {self.message}"
        return f"{text} ({self.hint})" if self.hint else text


@record
class BaseSpec:
    """Which base to merge into. `model` None: the adapter's own adapter_config.json names it.

    `model` is an absolute directory where one exists (relative names are relative to the config file), else a Hub
    id. `label` is the name as written, for the report. `dtypes` holds `auto` or names of `DTYPES`; each is checked.
    """

    model: str | None = None
    label: str | None = None
    revision: str | None = None
    dtypes: tuple[str, ...] = ("auto",)
    quantization: Quantization = Quantization.NONE


@record
class CheckSetting:
    """Severity of one check, and its limit where the check has one."""

    check: str
    severity: Severity
    limit: float | None = None


@record
class Expect:
    """What must be so of an adapter; absent entries are not checked. `sha256` pairs a file name and a hex digest."""

    peft_type: str | None = None
    r: int | None = None
    lora_alpha: float | None = None
    base: str | None = None
    sha256: tuple[tuple[str, str], ...] = ()


@record
class Combine:
    """A weighted combination of other listed adapters (PEFT's `add_weighted_adapter`). `adapters` holds names."""

    method: str
    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    density: float | None = None
    majority_sign_method: str | None = None
    seed: int = 0


@record
class AdapterSpec:
    """One entry of `adapters`. Exactly one of `path` (a directory, absolute), `hub_id` and `combine` is set.

    `source` is what the report shows: the path as written or the Hub id. `checks` has a setting for every check,
    the entry's own settings laid over the file's. `limit_seconds` None: a limit by the base's size.
    `line` is the entry's line in the YAML file.
    """

    name: str
    source: str
    path: str | None = None
    hub_id: str | None = None
    combine: Combine | None = None
    revision: str | None = None
    base: BaseSpec
    checks: tuple[CheckSetting, ...]
    expect: Expect | None = None
    limit_seconds: float | None = None
    line: int
    column: int


@record
class Config:
    """A valid configuration. `path` is the file as the user named it, `sha256` the digest of its bytes."""

    path: str
    sha256: str
    adapters: tuple[AdapterSpec, ...]
    allow_pickle: bool = False
    trust_remote_code: bool = False


# --- names turned into files ---------------------------------------------------------------------------------------


@record
class Snapshot:
    """Files on disk. `name` as written, `revision` the commit for a Hub id, None for a directory."""

    name: str
    directory: str
    revision: str | None = None


@record
class FileIdentity:
    """What tells a file from every other one, and from itself before a write (identity.py)."""

    name: str
    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int


@record
class FileRecord:
    """One input file of an adapter. `path` is relative to the adapter's directory.

    `identity` is that of the open file that was hashed; records of the same bytes are equal, whatever it is.
    """

    path: str = told("Relative to the adapter's directory.")
    size_bytes: int = told("Size in bytes.", key="bytes")
    sha256: str = told("Digest of its bytes, hex.")
    identity: FileIdentity | None = field(default=None, compare=False)


@record
class TensorHeader:
    """A tensor as the weights file describes it. `dtype` in safetensors' words (F32, BF16, …)."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@record
class AdapterFiles:
    """What the preflight read of an adapter without torch.

    `config_json` is the text of adapter_config.json, re-serialised (empty when it is missing or unreadable). `tensors`
    is empty where only torch can tell what pickled weights hold. `weights` is the file PEFT will load, relative to
    `directory`, or None.
    """

    directory: str
    config_json: str = ""
    peft_type: str | None = None
    task_type: str | None = None
    base_name: str | None = None
    base_revision: str | None = None
    weights: str | None = None
    tensors: tuple[TensorHeader, ...] = ()
    files: tuple[FileRecord, ...] = ()
    findings: tuple[Finding, ...] = ()


@record
class Prepared:
    """One adapter (or combination) whose names have become files; `problem` says why one has not."""

    spec: AdapterSpec
    members: tuple[AdapterFiles, ...] = ()
    revision: str | None = None
    base: Snapshot | None = None
    problem: Finding | None = None

    @property
    def files(self) -> AdapterFiles:
        """The members' files as one; of an ordinary adapter, its own."""
        if len(self.members) == 1:
            return self.members[0]
        first = self.members[0] if self.members else AdapterFiles(directory="")
        return replace(
            first,
            tensors=tuple(tensor for one in self.members for tensor in one.tensors),
            files=tuple(file for one in self.members for file in one.files),
            findings=tuple(finding for one in self.members for finding in one.findings),
        )


@record
class Entry:
    """One line of the report to be: an adapter in one dtype."""

    prepared: Prepared
    dtype: str


# --- measurements --------------------------------------------------------------------------------------------------


@record
class TensorStats:
    """One tensor, measured. `minimum` and `maximum` are over the finite elements, None where there is none.

    `dtype` in torch's words without the prefix (bfloat16). Of a quantised weight, the dequantised values.
    `first_index` is the index of the first non-finite element in row-major order. `is_buffer`: a persistent buffer of
    the base, no parameter.
    """

    name: str = told("Its name in the merged model.")
    dtype: str = told("Its dtype after the merge, in torch's words; of a quantised weight, of the dequantised values.")
    shape: tuple[int, ...] = told("Its shape.")
    numel: int = told("How many elements it has.")
    minimum: float | None = told("Smallest finite value; null where there is none.", default=None)
    maximum: float | None = told("Largest finite value; null where there is none.", default=None)
    nan: int = told("How many elements are NaN.", default=0)
    posinf: int = told("How many elements are +Infinity.", default=0)
    neginf: int = told("How many elements are -Infinity.", default=0)
    first_index: tuple[int, ...] | None = told("Index of the first non-finite element, row-major.", default=None)
    is_buffer: bool = False

    @property
    def finite(self) -> bool:
        return not (self.nan or self.posinf or self.neginf)

    @property
    def max_abs(self) -> float:
        return max((abs(value) for value in (self.minimum, self.maximum) if value is not None), default=0.0)


@record
class TensorMerge:
    """One parameter of the base as the merge leaves it.

    `stats` is of the merged tensor in its final dtype, named as in the merged model. `module` is the base's module.
    `dtype_max` is the largest finite value of the dtype. `changed` says whether any value differs from the base's (−0.0
    is 0.0) by more than the roundings of the merge itself. `base_norm` and `delta_norm` are Frobenius norms of the
    base's tensor and of the exact delta; `lost_norm` is ‖merged − (W + delta)‖; None where they were not measured.
    `unchanged_fraction` is the share of elements whose bits the merge left alone.

    `bounded` counts elements that were not merged one by one. Where there are some, `stats.minimum` and `stats.maximum`
    are bounds that no element exceeds. `estimated`: `base_norm`, `lost_norm`, `unchanged_fraction` and, of DoRA,
    `delta_norm` are estimates by a sample of the rows (engine/plan.py).
    """

    module: str = told("Module of the base.")
    stats: TensorStats = told("The merged tensor in its final dtype.")
    dtype_max: float = told("Largest finite value of the dtype.")
    changed: bool = told("Whether any element differs from the base.")
    base_norm: float | None = told("‖W‖, the Frobenius norm of the base's tensor.", default=None)
    delta_norm: float | None = told("‖ΔW‖, the Frobenius norm of the exact delta.", default=None)
    lost_norm: float | None = told(
        "What rounding took: the norm of the merged tensor less the exact sum W + ΔW.", default=None
    )
    unchanged_fraction: float | None = told("Share of elements whose bits the merge left alone.", default=None)
    bounded: int = told(
        "Elements that were not merged one by one; where there are some, `minimum` and `maximum` are bounds that no "
        "element exceeds.",
        default=0,
    )
    estimated: bool = told("Whether `lost_norm` and `unchanged_fraction` are estimates by a sample.", default=False)

    @property
    def headroom(self) -> float | None:
        """The largest magnitude as a share of what the dtype holds."""
        return _share(self.stats.max_abs, self.dtype_max)

    @property
    def delta_ratio(self) -> float | None:
        """‖ΔW‖/‖W‖."""
        return _share(self.delta_norm, self.base_norm)

    @property
    def lost_share(self) -> float | None:
        """Share of the delta's norm that rounding took."""
        return _share(self.lost_norm, self.delta_norm)


def _share(part: float | None, whole: float | None) -> float | None:
    """None where one is not known, or the share is no number."""
    if part is None or not whole or not math.isfinite(part) or not math.isfinite(whole):
        return None
    return part / whole


@record
class Leeway:
    """What need not be merged or measured, because the checks do not ask for it; none of it by default.

    With `estimates`, norms and losses may be those of a sample of the rows. A `headroom` above 0 lets a bound stand for
    the merge of a weight, if it proves every value finite and below this share of the dtype's largest (`--quick`).
    """

    headroom: float = 0.0
    estimates: bool = False


NO_LEEWAY = Leeway()


@record
class FileTensor:
    """One tensor of the adapter's file. `used` False: the merge does not read it."""

    stats: TensorStats
    used: bool = True


@record
class Refusal:
    """Why an adapter could not be loaded or merged, in the check table's words.

    `check` is a check's id (`shape-mismatch`, `targets-not-found`, `not-mergeable`, …), or None when the gate itself
    could not judge (a missing package, out of memory, a crash): the verdict is then `error`.
    """

    check: str | None
    message: str
    hint: str = ""
    module: str | None = None
    tensor: str | None = None
    origin: Origin = Origin.RUNTIME


@record
class BaseFacts:
    """The base as it was measured, once. `parameters` counts elements of parameters and persistent buffers.

    `loaded_as` is the class of the model. `replaced` names the tensors of its own head that gave way to the head of
    another size that the adapters bring.
    """

    model: str
    revision: str | None
    dtype: str
    quantization: Quantization
    sha256: str | None = None
    parameters: int = 0
    nonfinite: tuple[TensorStats, ...] = ()
    loaded_as: str = ""
    replaced: tuple[str, ...] = ()


@record
class Evidence:
    """Everything that was measured of one adapter on one base: what the checks judge.

    `missing` are tensors the config promises and that did not arrive in the model, `dropped` those of them that are in
    the file, `unexpected` those in the file that nothing in the merge uses, in the file's own names. `targeted` are
    the base's modules that the adapter was put on. `tied` pairs a merged tensor with the module that shares it
    unmerged. `refused_by_safe_merge` names modules that PEFT's `safe_merge=True` refuses although the merged tensor is
    finite. `instead_of` is the class that the adapter's task type asks for, where its names fit only the class that the
    base was loaded as.

    `layers_in_blocks` were merged a block of rows at a time, `layers_by_peft` by PEFT itself; `witnessed` are those of
    the former that PEFT merged as well, with the same bits. Where PEFT's bits were others, `differing` names the
    layers, and all were merged by PEFT.
    """

    base: BaseFacts
    peft_type: str | None = None
    file_tensors: tuple[FileTensor, ...] = ()
    missing: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    targeted: tuple[str, ...] = ()
    merges: tuple[TensorMerge, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    refused_by_safe_merge: tuple[str, ...] = ()
    layers_in_blocks: int = 0
    layers_by_peft: int = 0
    witnessed: tuple[str, ...] = ()
    differing: tuple[str, ...] = ()
    refusal: Refusal | None = None
    instead_of: str | None = None
    seed: int | None = None
    parameters_checked: int = 0
    parameters_bounded: int = 0
    parameters_total: int = 0
    seconds: float = 0.0

    @property
    def rounded(self) -> tuple[TensorMerge, ...]:
        """The merges of which it is known what rounding took."""
        return tuple(
            one
            for one in self.merges
            if one.lost_norm is not None and one.delta_norm and math.isfinite(one.lost_norm + one.delta_norm)
        )

    @property
    def lost_share(self) -> float | None:
        """Share of the delta's norm that rounding took, over all of these; None where there are none."""
        lost, delta = (
            math.hypot(*(norm or 0.0 for norm in norms))
            for norms in ([one.lost_norm for one in self.rounded], [one.delta_norm for one in self.rounded])
        )
        return lost / delta if delta else None


# --- judgement and report ------------------------------------------------------------------------------------------


@record
class Finding:
    """One thing worth saying of an adapter or a base: what, where, got, expected (`message`) and what now (`hint`).

    `measured` pairs a figure's name and its value (a share, a norm, a limit), for programs.
    """

    check: str = told("Id of the check.")
    severity: Severity = told("`error` fails the adapter, `warning` does not.")
    message: str = told("What is wrong, where, what was found and what was expected.")
    hint: str = told("What to do about it; may be empty.", default="")
    module: str | None = told("Module of the base.", default=None)
    tensor: str | None = told("Tensor, named as in the file or the model it is from.", default=None)
    origin: Origin = told("Where the cause lies.")
    nan: int | None = told("How many values of the tensor are NaN.", default=None)
    posinf: int | None = told("How many values of the tensor are +Infinity.", default=None)
    neginf: int | None = told("How many values of the tensor are -Infinity.", default=None)
    numel: int | None = told("How many values the tensor has.", default=None)
    first_index: tuple[int, ...] | None = told("Index of the first non-finite value, row-major.", default=None)
    measured: tuple[tuple[str, float], ...] = told(
        'The figures behind the finding, by name. JSON has no infinities: those are the strings `"Infinity"`, '
        '`"-Infinity"` and `"NaN"`.',
        default=(),
    )


@record
class Coverage:
    """How much of the adapter and of the model was checked.

    `parameters_bounded`, of the `parameters_checked`, were not merged one by one: a bound stands for them
    (engine/bound.py).
    """

    adapter_tensors: int = told("Tensors in the adapter's file.", default=0)
    applied: int = told("Of these, tensors that the merge used.", default=0)
    modules_merged: int = told("Modules of the base that the adapter was put on, merged and measured.", default=0)
    layers_in_blocks: int = told("Layers that were merged a block of rows at a time.", default=0)
    layers_by_peft: int = told("Layers that PEFT merged itself, and nobody else.", default=0)
    layers_witnessed: int = told(
        "Of those in blocks, layers that PEFT merged as well, with the same bits: at least one of each kind.", default=0
    )
    layers_differing: tuple[str, ...] = told(
        "Layers of which PEFT's bits were others, the first ten; then PEFT has merged all layers.", default=()
    )
    parameters_checked: int = told(
        "Elements of the merged model that were checked; equal to `parameters_total` for every adapter that passed.",
        default=0,
    )
    parameters_bounded: int = told(
        "Of the checked ones, elements that were not merged one by one, since base and adapter hold no values large "
        "enough to overflow; 0 without `--quick`.",
        default=0,
    )
    parameters_total: int = told("Elements that the merged model has.", default=0)


@record
class BaseRef:
    """The base that an adapter was judged on."""

    model: str | None = told("Directory or Hub id as written; null where none could be found out.")
    revision: str | None = told("The commit that a Hub id was resolved to; null for a directory.")
    dtype: str = told("The dtype that was checked, in torch's words.")
    quantization: Quantization = told("How the base was quantised when it was loaded.")


@record
class AdapterReport:
    """One adapter on one base in one dtype. `line` and `column` are the entry's place in the YAML file.

    `seed` is that of a combination by a random method, with which it gives the same bits again.
    """

    name: str = told("Its name in the configuration.")
    source: str = told("Its path as written, or its Hub id.")
    revision: str | None = told("The commit that a Hub id was resolved to; null for a directory.", default=None)
    base: BaseRef = told("The base that it was merged into.")
    peft_type: str | None = told(
        "PEFT's name of the method, such as `LORA`; null where it could not be read.", default=None
    )
    verdict: Verdict = told("`error` where it could not be judged. Only `passed` clears it.")
    cause: str | None = told(
        "Id of the check that decided, the one nearest the root; `not-judged` with the verdict `error`; null when "
        "passed.",
        default=None,
    )
    findings: tuple[Finding, ...] = told("All findings, whichever is the cause.", default=())
    coverage: Coverage = told("How much was checked.", default=Coverage())
    files: tuple[FileRecord, ...] = told("The files that were read.", default=())
    seconds: float = told("Time that the adapter took; null where it was not measured.", default=0.0)
    seed: int | None = told(
        "The seed of a combination by a random method (`dare_…`); null for everything else.", default=None
    )
    line: int = told("Line of its entry in the configuration file, counted from 1.")
    column: int = told("Column of its entry, counted from 1.")
    tensors: tuple[TensorMerge, ...] = told(
        "Every tensor that the merge touched, as it left it: `rows`, and the names of their `columns`. Figures are "
        "rounded to six significant digits.",
        default=(),
        as_rows=True,
    )


@record
class BaseReport:
    """One base that was loaded."""

    model: str = told("Directory or Hub id as written.")
    revision: str | None = told("The commit that a Hub id was resolved to; null for a directory.", default=None)
    dtype: str = told("The dtype that was checked, in torch's words.")
    quantization: Quantization = told("How the base was quantised when it was loaded.")
    sha256: str | None = told("Digest of its weights, hex; null where it was not taken.", default=None)
    parameters: int = told("Elements of all its parameters and persistent buffers.", default=0)
    findings: tuple[Finding, ...] = told("What is wrong with the base itself, before any merge.", default=())
    loaded_as: str = told("Class of transformers that it was loaded as.", default="")
    replaced: tuple[str, ...] = told(
        "Tensors of its own head that gave way, since the adapters bring a head with another number of labels.",
        default=(),
    )


@record
class Environment:
    """What the run ran on. Versions are None where a package is absent or was not needed."""

    python: str = told("Version of Python.")
    torch: str | None = told("Version of torch; null where it is absent.", default=None)
    peft: str | None = told("Version of PEFT; null where it is absent.", default=None)
    transformers: str | None = told("Version of transformers; null where it is absent.", default=None)
    bitsandbytes: str | None = told("Version of bitsandbytes; null where it is absent.", default=None)
    device: str = told("`cpu`, `cuda:0`, …", default="cpu")
    device_name: str = told("The device's own name; may be empty.", default="")


@record
class Report:
    """A run. `complete` False: the run is still going on, or was killed; what it holds is true."""

    complete: bool
    tool_version: str
    environment: Environment
    config_path: str
    config_sha256: str
    bases: tuple[BaseReport, ...] = ()
    adapters: tuple[AdapterReport, ...] = ()

    def count(self, verdict: Verdict) -> int:
        return sum(adapter.verdict is verdict for adapter in self.adapters)

    @property
    def result(self) -> Result:
        """A proven failure outranks an undecided adapter; nothing judged, or an unfinished run, is never `pass`."""
        if self.count(Verdict.FAILED):
            return Result.FAIL
        if self.count(Verdict.ERROR) or not self.adapters or not self.complete:
            return Result.ERROR
        return Result.PASS
