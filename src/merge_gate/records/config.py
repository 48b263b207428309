"""What a configuration asks for."""

from __future__ import annotations

import datetime as dt

from merge_gate.records.terms import BaseKey, Quantization, Severity, record

COMMAND_LINE = "the command line"
"""What stands for the configuration's path where the adapters are named on the command line."""


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

    def key(self, dtype: str = "auto") -> BaseKey:
        """The base in one of its dtypes, as the configuration asks for it."""
        return BaseKey(model=self.model, revision=self.revision, dtype=dtype, quantization=self.quantization)


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
class KnownFailure:
    """A failure that somebody answers for until the end of a day. `adapter` is the digest of its files.

    `cause` is the check that decided, `also` are others that may fail the adapter. `line` is its place in the file.
    """

    adapter: str
    cause: str
    also: tuple[str, ...] = ()
    reason: str
    owner: str
    until: dt.date
    line: int


@record
class Config:
    """A valid configuration. `path` is the file as the user named it, `sha256` the digest of its bytes.

    `baseline_path` names the file that `baseline` was read from.
    """

    path: str
    sha256: str
    adapters: tuple[AdapterSpec, ...]
    allow_pickle: bool = False
    trust_remote_code: bool = False
    baseline_path: str | None = None
    baseline: tuple[KnownFailure, ...] = ()
