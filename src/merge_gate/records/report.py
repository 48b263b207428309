"""The records of report.json: a run, its bases, and its adapters."""

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

    `parameters_bounded` of the `parameters_checked` were not merged one by one: a bound proves that they are finite
    (engine/blocks/bound.py).
    """

    adapter_tensors: int = told("Tensors in the adapter's file.", default=0)
    applied: int = told("Tensors of the file that the merge used.", default=0)
    modules_merged: int = told("Modules of the base that the adapter changes.", default=0)
    layers_in_blocks: int = told("Layers that were merged in blocks of rows.", default=0)
    layers_by_peft: int = told("Layers that only PEFT merged.", default=0)
    layers_witnessed: int = told(
        "Layers in blocks that PEFT merged too, with the same bits (the cross-check): at least one of each kind.",
        default=0,
    )
    layers_differing: tuple[str, ...] = told(
        "The first ten layers with other bits than PEFT's. If there is one, PEFT has merged all layers.", default=()
    )
    parameters_checked: int = told(
        "Elements of the merged model that were checked; equal to `parameters_total` for every adapter that passed.",
        default=0,
    )
    parameters_bounded: int = told(
        "Checked elements that were not merged one by one, because a bound proves them finite; 0 without `--quick`.",
        default=0,
    )
    parameters_total: int = told("Elements of the merged model.", default=0)


@record
class Judged:
    """The time and place of a verdict, and its cache key."""

    key: str = told("Digest of everything that decides the verdict: files, base, settings, versions.")
    at: str = told("Time of the verdict, in UTC.")
    place: str = told("The CI run, or the name of the machine.")
    seconds: float = told("Seconds that the adapter took; null if they were not measured.")
    seal: str = told(
        "Seal of the verdict, by which a later run recognizes it: an HMAC with `MERGE_GATE_CACHE_KEY` if that is set, "
        "else a digest."
    )


@record
class Accepted:
    """The owner and the last day of a known failure."""

    reason: str = told("Why it is accepted.")
    owner: str = told("Who is responsible for it.")
    until: str = told("The last day on which it is accepted; after that day the adapter fails the run.")


@record
class BaselineEntry:
    """One acceptance of the baseline, and its outcome in this run."""

    adapter: str = told("Digest of the adapter's files, hex.")
    cause: str = told("The check that decided.")
    also: tuple[str, ...] = told("Other checks that may fail the adapter.", default=())
    reason: str = told("Why it is accepted.")
    owner: str = told("Who is responsible for it.")
    until: str = told("The last day on which it is accepted.")
    outcome: Acceptance = told(
        "`used`; `expired`: its last day is over; `fails otherwise too`: another check failed that it does not name; "
        "`matches nothing` in this run."
    )
    line: int = told("Its line in the baseline file, counted from 1.")


@record
class AdapterReport:
    """One adapter on one base in one dtype. `line` and `column` are the entry's place in the YAML file.

    `decided_by` is the index of the finding that decided; None for a passed adapter. `seed` is the seed of a
    combination by a random method, with which a merge gives the same bits again.
    """

    name: str = told("Its name in the configuration.")
    source: str = told("Its path as written, or its Hub id.")
    revision: str | None = told("The commit that a Hub id was resolved to; null for a directory.", default=None)
    base: BaseKey = told("The base that it was merged into.")
    peft_type: str | None = told(
        "PEFT's name of the method, such as `LORA`; null if it could not be read.", default=None
    )
    saved_by: str | None = told(
        "Version of PEFT that saved it, by its adapter_config.json; null if the file does not give it (before PEFT "
        "0.18).",
        default=None,
    )
    verdict: Verdict = told("`error` if it could not be judged. Only `passed` clears it.")
    cause: str | None = told(
        "Id of the check that decided, nearest to the root; `not-judged` with the verdict `error`; null if it passed.",
        default=None,
    )
    findings: tuple[Finding, ...] = told("All findings, not only the cause.", default=())
    decided_by: int | None = None
    coverage: Coverage = told("How much was checked.", default=Coverage())
    files: tuple[FileRecord, ...] = told("The files that were read.", default=())
    seconds: float = told("Seconds that the adapter took; null if they were not measured.", default=0.0)
    seed: int | None = told(
        "The seed of a combination by a random method (`dare_…`); null for any other adapter.", default=None
    )
    line: int = told("Line of its entry in the configuration file, counted from 1.")
    column: int = told("Column of its entry, counted from 1.")
    tensors: tuple[TensorMerge, ...] = told(
        "Every tensor that the merge touched, after the merge: `rows`, and the names of their `columns`. Figures are "
        "rounded to six significant digits.",
        default=(),
        as_rows=True,
    )
    judged: Judged | None = told(
        "Time and place of the verdict; null if no later run can reuse it.",
        default=None,
    )
    cached: bool = told(
        "Whether the verdict of an earlier run was reused (`--cache`, `--resume`); `seconds` is then 0.",
        default=False,
    )
    accepted: Accepted | None = told(
        "The acceptance of the failure, if the baseline has one; the verdict stays `failed`.", default=None
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
    sha256: str | None = told("Digest of its weights, hex; null if it was not computed.", default=None)
    parameters: int = told("Elements of all its parameters and persistent buffers.", default=0)
    findings: tuple[Finding, ...] = told("Findings about the base itself, before any merge.", default=())
    dtypes: tuple[tuple[str, float], ...] = told(
        "How many parameters have which dtype, if they are mixed; a packed weight has the name of its packing.",
        default=(),
    )
    loaded_as: str = told("The class of transformers that loaded it.", default="")
    replaced: tuple[str, ...] = told(
        "Tensors of its own head that were replaced, because the adapters have a head with another number of labels.",
        default=(),
    )

    @property
    def key(self) -> BaseKey:
        return BaseKey(model=self.model, revision=self.revision, dtype=self.dtype, quantization=self.quantization)


@record
class Sandbox:
    """The restrictions of the worker process (worker/confine/sandbox.py)."""

    held: tuple[str, ...] = told(
        "The restrictions in force: `files` (it writes only its own), `network` (none), `processes` (no other), "
        "`file size`, `memory`; empty if nothing was merged.",
        default=(),
    )
    missing: tuple[str, ...] = told("The missing restrictions, each with its reason.", default=())


@record
class Environment:
    """The environment of the run. A version is None if the package is absent or was not needed."""

    python: str = told("Version of Python.")
    torch: str | None = told("Version of torch; null if it is absent.", default=None)
    peft: str | None = told("Version of PEFT; null if it is absent.", default=None)
    transformers: str | None = told("Version of transformers; null if it is absent.", default=None)
    bitsandbytes: str | None = told("Version of bitsandbytes; null if it is absent.", default=None)
    device: str = told("`cpu`, `cuda:0`, …", default="cpu")
    device_name: str = told("The device's own name; may be empty.", default="")
    sandbox: Sandbox = told("The restrictions of the process that merged.", default=Sandbox())


@record
class Shard:
    """The part of a larger run that a report covers, for `merge-gate report combine` (shards/combined.py)."""

    index: int = told("Its number, counted from 1.")
    count: int = told("How many shards the run has.")
    plan_sha256: str = told(
        "Digest of the plan: configuration, version of merge-gate, options, and the shard of each entry. Shards with "
        "different plans are not of the same run."
    )
    versions_sha256: str = told(
        "Digest of merge-gate's own code and of the versions of all libraries that decide a verdict."
    )
    entries: int = told("How many entries (adapters, times dtypes) the run has in all shards.")
    positions: tuple[int, ...] = told(
        "Positions of this shard's entries in the run, counted from 0, in the order of `adapters`; empty if there are "
        "more shards than adapters.",
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

    path: str = told("As named on the command line; `the command line` if the adapters are named there.")
    sha256: str = told("Digest of its bytes, hex; without a file, the digest of the named adapters, base and dtypes.")


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
    also for a combination of shards.
    """

    schema_version: str = told("Version of this format. Readers accept any 1.x.", init=False)
    complete: bool = told("False during the run, and forever if it was killed.")
    result: Result = told("The run's result. An unfinished run, or one that judged nothing, never passes.", init=False)
    counts: Counts = told("Entries of `adapters` by verdict; an adapter has one for each dtype.", init=False)
    tool: Tool = told("The program that wrote the report.")
    environment: Environment = told("The environment of the run.")
    config: ConfigFile = told("The configuration file.")
    bases: tuple[BaseReport, ...] = told("Every loaded base, once.", default=())
    adapters: tuple[AdapterReport, ...] = told(
        "One entry per adapter, base and dtype, in the order of the file.", default=()
    )
    shard: Shard | None = told(
        "The part of a larger run (`--shard`); null for a whole run, also for a combination of shards.",
        default=None,
    )
    accepted: int = told(
        "How many failed entries the baseline accepts. If it accepts all of them, `result` can be `pass`.",
        default=0,
        init=False,
    )
    baseline: tuple[BaselineEntry, ...] = told("The outcome of each entry of the baseline.", default=())
    problems: tuple[str, ...] = told(
        "The reasons why the combined shards are not one run. With any, `result` is never `pass`.", default=()
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
