"""The content of a configuration."""

from __future__ import annotations

from collections.abc import Mapping

from merge_gate.records.features import WordKey
from merge_gate.records.terms import (
    Access,
    BaseKey,
    BaselineEntry,
    ForwardMode,
    Quantization,
    Severity,
    record,
    reported,
)

COMMAND_LINE = "the command line"
"""What a configuration is called if the adapters are named on the command line."""

A_FILE = "a configuration file (`merge-gate init` writes one)"
"""For hints about settings that have no option. The run may be one without a file."""


FILE_KEYS: Mapping[str, WordKey] = {
    "forward": WordKey(
        ForwardMode,
        description="Whether base and adapter are run on made-up inputs: {}. With auto, they are run if activations "
        "can leave the dtype, and the base is read whole and not streamed. With required, they are run in each dtype, "
        "and an adapter whose model was not run is not judged. Default: auto.",
        meaning="run base and adapter on made-up inputs, and check what their modules return: if activations can leave "
        "the dtype (auto), never (off), or judge no adapter without it (required) (default: as in the config, or auto)",
    )
}
"""Keys of a file, by field of `AdapterSpec`, that are options of `merge-gate run`, too."""

ALL_WEIGHTS = "*"
"""In `BaseSpec.sha256`: the digest of all weight files together, as the report has it."""


@record
class Problem:
    """One thing wrong with the configuration. `line` and `column` count from 1; `line` is 0 if there is no file."""

    message: str
    path: str
    line: int
    column: int
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.path}:{self.line}:{self.column}" if self.line else self.path
        text = f"{place}: {self.message}"
        return f"{text} ({self.hint})" if self.hint else text


@record
class BaseSpec:
    """Which base to merge into.

    Attributes:
        model: an absolute directory if there is one, or a Hub id. None if the adapter's adapter_config.json names it.
        label: the name as written, for the report.
        revision: a commit, tag, or branch of a Hub id.
        dtypes: `auto` or names of `DTYPES`. Each one is checked.
        quantization: how the base is quantized when it is loaded.
        access: how its weights are read, if it is on the Hub.
        names: other names that adapters may give for this base.
        sha256: pairs of file names and the hex digests that they must have. `ALL_WEIGHTS` stands for all weight files.
    """

    model: str | None = None
    label: str | None = None
    revision: str | None = None
    dtypes: tuple[str, ...] = ("auto",)
    quantization: Quantization = Quantization.NONE
    access: Access = Access.AUTO
    names: tuple[str, ...] = ()
    sha256: tuple[tuple[str, str], ...] = ()

    def key(self, dtype: str = "auto") -> BaseKey:
        """The base in one of its dtypes, as the configuration asks for it."""
        return BaseKey(model=self.model, revision=self.revision, dtype=dtype, quantization=self.quantization.value)


@record
class CheckSetting:
    """Severity of one check, and its limits if the check has any. Above `error_limit`, a warning is an error.

    A warning with the origin `base` has the severity `of_base`, if there is one. A weight matrix that becomes zeros has
    the severity `wiped`, or the check's.
    """

    check: str
    severity: Severity
    limit: float | None = None
    error_limit: float | None = None
    of_base: Severity | None = None
    wiped: Severity | None = None


@record
class Expect:
    """What the user expects of an adapter. None is not checked. `sha256` pairs file names and hex digests."""

    peft_type: str | None = None
    r: int | None = None
    lora_alpha: float | None = None
    projection_prng_key: int | None = None
    base: str | None = None
    sha256: tuple[tuple[str, str], ...] = ()


@record
class Combine:
    """A weighted combination of other listed adapters (PEFT's `add_weighted_adapter`).

    `adapters` holds names; merge-gate.json lists the adapters themselves.
    """

    method: str = reported("PEFT's `combination_type`, such as `ties`.")
    adapters: tuple[str, ...] = ()
    weights: tuple[float, ...] = reported("The weight of each adapter.")
    density: float | None = reported("The share of values that the method keeps.", default=None)
    majority_sign_method: str | None = reported("How the method elects signs.", default=None)
    seed: int = reported("The seed of a random method.", default=0)


@record
class AdapterSpec:
    """One entry of `adapters`. Exactly one of `path` (a directory, absolute), `hub_id` and `combine` is set.

    `source` is the path as written, or the Hub id, for the report. `checks` has a setting for every check: the entry's
    own, or the file's. `forward` is the file's. With `timeout_seconds` None, the limit depends on the size of the base.
    `line` and `column` are the entry's place in the YAML file.
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
    forward: ForwardMode = ForwardMode.AUTO
    timeout_seconds: float | None = None
    line: int
    column: int


@record
class PublishSpec:
    """How merged models are published, and to which directory.

    Attributes:
        directory: the directory of all models, absolute or relative to the current one.
        label: the directory as written, for the report.
        dtype: `preserve` keeps the dtype of each stored tensor; else the dtype that all floating tensors are cast to.
        max_shard_bytes: the most bytes of tensors in a file; None keeps the base's files.
    """

    directory: str
    label: str
    dtype: str = "preserve"
    max_shard_bytes: int | None = None


@record
class Config:
    """A valid configuration.

    Attributes:
        path: the file as the user named it; None if the adapters are named on the command line.
        directory: where relative names start: the file's directory, or the current one. Absolute.
        sha256: the digest of the file's bytes, or of the named adapters and their options.
        publish: how the merged models of adapters that pass are published; None publishes none.
        policy: the name of the preset of strictness (judging/policies.py).
        baseline_path: the file that `baseline` was read from.
    """

    path: str | None
    directory: str
    sha256: str
    adapters: tuple[AdapterSpec, ...]
    allow_pickle: bool = False
    trust_remote_code: bool = False
    baseline_path: str | None = None
    baseline: tuple[BaselineEntry, ...] = ()
    publish: PublishSpec | None = None
    policy: str = "default"

    @property
    def trusts(self) -> tuple[str, ...]:
        """What it allows, by the keys of a configuration."""
        allowed = {"allow-pickle": self.allow_pickle, "trust-remote-code": self.trust_remote_code}
        return tuple(name for name, is_allowed in allowed.items() if is_allowed)

    @property
    def label(self) -> str:
        """What messages and reports call the configuration."""
        return COMMAND_LINE if self.path is None else self.path
