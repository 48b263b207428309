"""What is said of each adapter and of the run: the content of report.json."""

from __future__ import annotations

from collections import Counter

from merge_gate.records.files import FileRecord
from merge_gate.records.measured import TensorMerge
from merge_gate.records.terms import Acceptance, BaseKey, Finding, Result, Verdict, record, told

SCHEMA_VERSION = "1.0"
TOOL = "merge-gate"


@record
class Coverage:
    """How much of the adapter and of the model was checked.

    `parameters_bounded`, of the `parameters_checked`, were not merged one by one: a bound stands for them
    (engine/blocks/bound.py).
    """

    adapter_tensors: int = told("Tensors in the adapter's file.", default=0)
    applied: int = told("Of these, tensors that the merge used.", default=0)
    modules_merged: int = told("Modules of the base that the adapter was put on.", default=0)
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
        "Of the checked ones, elements that a bound proves to be finite, and that were not merged one by one; 0 "
        "without `--quick`.",
        default=0,
    )
    parameters_total: int = told("Elements that the merged model has.", default=0)


@record
class Judged:
    """When and where a verdict was reached, and what it rests on."""

    key: str = told("What the verdict rests on, as a digest: files, base, settings, versions. Same key, same verdict.")
    at: str = told("When it was reached, in UTC.")
    place: str = told("Where: the CI run, or the name of the machine.")
    seconds: float = told("Time that the adapter took then; null where it was not measured.")
    seal: str = told(
        "Seal of all that the verdict says, by which a later run knows it as its own: an HMAC under "
        "`MERGE_GATE_CACHE_KEY` where that is set, else a digest."
    )


@record
class Accepted:
    """Who answers for a failure that is known, and how long."""

    reason: str = told("Why it is accepted.")
    owner: str = told("Who answers for it.")
    until: str = told("The last day on which it is; after it the adapter fails the run.")


@record
class BaselineEntry:
    """One acceptance of the baseline, and what came of it."""

    adapter: str = told("Digest of the adapter's files, hex.")
    cause: str = told("The check that decided.")
    also: tuple[str, ...] = told("Other checks that may fail the adapter.", default=())
    reason: str = told("Why it is accepted.")
    owner: str = told("Who answers for it.")
    until: str = told("The last day on which it is.")
    outcome: Acceptance = told(
        "`used`; `expired`: its last day is over; `fails otherwise too`: a check failed that it does not name; "
        "`matches nothing` in this run."
    )
    line: int = told("Its line in the baseline's file, counted from 1.")


@record
class AdapterReport:
    """One adapter on one base in one dtype. `line` and `column` are the entry's place in the YAML file.

    `decided_by` is the index of the finding that decided the verdict, None for a passed adapter. `seed` is that of a
    combination by a random method, with which it gives the same bits again.
    """

    name: str = told("Its name in the configuration.")
    source: str = told("Its path as written, or its Hub id.")
    revision: str | None = told("The commit that a Hub id was resolved to; null for a directory.", default=None)
    base: BaseKey = told("The base that it was merged into.")
    peft_type: str | None = told(
        "PEFT's name of the method, such as `LORA`; null where it could not be read.", default=None
    )
    saved_by: str | None = told(
        "Version of PEFT that saved it, by its adapter_config.json; null where that does not say (before PEFT 0.18).",
        default=None,
    )
    verdict: Verdict = told("`error` where it could not be judged. Only `passed` clears it.")
    cause: str | None = told(
        "Id of the check that decided, the one nearest the root; `not-judged` with the verdict `error`; null when "
        "passed.",
        default=None,
    )
    findings: tuple[Finding, ...] = told("All findings, whichever is the cause.", default=())
    decided_by: int | None = None
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
    judged: Judged | None = told(
        "When and where the verdict was reached; null where it is of this run only and can never be taken over.",
        default=None,
    )
    cached: bool = told(
        "Whether an earlier run reached the verdict and this one took it over (`--cache`, `--resume`); `seconds` is "
        "then 0.",
        default=False,
    )
    accepted: Accepted | None = told(
        "Who answers for the failure, where the baseline has it; the verdict stays `failed`.", default=None
    )


@record
class BaseReport:
    """One base that was loaded."""

    model: str = told("Directory or Hub id as written.")
    revision: str | None = told("The commit that a Hub id was resolved to; null for a directory.", default=None)
    dtype: str = told("The dtype that was checked, in torch's words.")
    quantization: str = told(
        "How the loaded base is quantized: `none`, `bnb-8bit`, `bnb-4bit`, or the method that the base declares, such "
        "as `fp8`; for a base that was not loaded, what the config asks for."
    )
    sha256: str | None = told("Digest of its weights, hex; null where it was not taken.", default=None)
    parameters: int = told("Elements of all its parameters and persistent buffers.", default=0)
    findings: tuple[Finding, ...] = told("What is wrong with the base itself, before any merge.", default=())
    dtypes: tuple[tuple[str, float], ...] = told(
        "How many parameters have which dtype, if they are mixed; a packed weight has the name of its packing.",
        default=(),
    )
    loaded_as: str = told("Class of transformers that it was loaded as.", default="")
    replaced: tuple[str, ...] = told(
        "Tensors of its own head that gave way, since the adapters bring a head with another number of labels.",
        default=(),
    )

    @property
    def key(self) -> BaseKey:
        return BaseKey(model=self.model, revision=self.revision, dtype=self.dtype, quantization=self.quantization)


@record
class Sandbox:
    """What the kernel keeps the worker process from (worker/confine/sandbox.py)."""

    held: tuple[str, ...] = told(
        "What held: `files` (nothing written but its own), `network` (none), `processes` (no other one), `file size`, "
        "`memory`; empty where nothing was merged.",
        default=(),
    )
    missing: tuple[str, ...] = told("What did not hold, each with its reason.", default=())


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
    sandbox: Sandbox = told("What the process that merged was kept from.", default=Sandbox())


@record
class Shard:
    """Which part of a larger run a report is of, for `merge-gate report combine` (shards/combined.py)."""

    index: int = told("Its number, counted from 1.")
    count: int = told("How many shards the run has.")
    plan_sha256: str = told(
        "Digest of the plan: configuration, version of merge-gate, options, all entries, and the shard of each. Shards "
        "with another one are not of the same run."
    )
    versions_sha256: str = told(
        "Digest of merge-gate's own code and of the versions of all libraries that take part in a verdict."
    )
    entries: int = told("How many entries (adapters, times dtypes) the run has in all shards.")
    positions: tuple[int, ...] = told(
        "Of those, counted from 0 in the order of the file, the ones of this shard, as `adapters` has them; empty "
        "where there are more shards than adapters.",
        default=(),
    )
    bases_from: tuple[int, ...] = told(
        "For each of `bases`, the position of the first entry that was merged into it.", default=()
    )


@record
class Tool:
    """The program that wrote the report."""

    name: str = told("Always `merge-gate`.")
    version: str = told("Its version.")


@record
class ConfigFile:
    """The configuration file of the run."""

    path: str = told("As named on the command line; `the command line` where that names the adapters themselves.")
    sha256: str = told("Digest of its bytes, hex; without a file, of the adapters, base and dtypes that were named.")


@record
class Counts:
    """The entries of `adapters` by verdict: one for each adapter, base and dtype."""

    passed: int = told("Entries that passed.")
    failed: int = told("Entries that failed.")
    error: int = told("Entries that could not be judged.")


@record
class Report:
    """A run: the whole of report.json, with the fields in the order of the file.

    `schema_version`, `result`, `counts`, and `accepted` follow from the other fields. `shard` is None for a whole run,
    also for one that was combined of shards.
    """

    schema_version: str = told("Version of this format. Readers accept any 1.x.", init=False)
    complete: bool = told("False while the run goes on, and for ever if it was killed.")
    result: Result = told("The run's result. An unfinished run, or one that judged nothing, never passes.", init=False)
    counts: Counts = told("Entries of `adapters` by verdict; an adapter has one for each dtype.", init=False)
    tool: Tool = told("What wrote this.")
    environment: Environment = told("What the run ran on.")
    config: ConfigFile = told("The configuration file.")
    bases: tuple[BaseReport, ...] = told("Every base that was loaded, once.", default=())
    adapters: tuple[AdapterReport, ...] = told(
        "One entry per adapter, base and dtype, in the order of the file.", default=()
    )
    shard: Shard | None = told(
        "Which part of a larger run this is (`--shard`); null for a whole run, also one combined of shards.",
        default=None,
    )
    accepted: int = told(
        "How many of the failed ones the baseline accepts; where it is all of them, `result` is `pass`.",
        default=0,
        init=False,
    )
    baseline: tuple[BaselineEntry, ...] = told("What came of each entry of the baseline.", default=())
    problems: tuple[str, ...] = told(
        "What keeps the shards that were combined from being one run; with any, `result` is never `pass`.", default=()
    )

    def __post_init__(self) -> None:
        verdicts = Counter(adapter.verdict.value for adapter in self.adapters)
        accepted = [adapter for adapter in self.adapters if adapter.verdict is Verdict.FAILED and adapter.accepted]
        derived = {
            "schema_version": SCHEMA_VERSION,
            "counts": Counts(**{verdict.value: verdicts[verdict.value] for verdict in Verdict}),
            "accepted": len(accepted),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "result", self._result())

    def _result(self) -> Result:
        """A failure that no one accepts outranks an undecided adapter. An empty or unfinished run never passes.

        A shard may have nothing to judge if there are more shards than adapters. Then it decides nothing: the
        combination counts the entries.
        """
        if self.counts.failed > self.accepted:
            return Result.FAIL
        if self.counts.error or not self.complete or self.problems:
            return Result.ERROR
        return Result.PASS if self.adapters or self.is_empty_shard else Result.ERROR

    @property
    def is_empty_shard(self) -> bool:
        return self.shard is not None and not self.shard.positions and self.shard.entries > 0
