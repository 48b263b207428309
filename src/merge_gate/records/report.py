"""The records of report.json: a run, its bases, and its adapters."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from merge_gate.records.files import HashedFile
from merge_gate.records.measured import Forward, TensorMerge
from merge_gate.records.terms import BaseKey, BaselineEntry, FailureKind, Finding, Result, Verdict, record, reported

SCHEMA_VERSION = "1.0"
TOOL = "merge-gate"


@record
class Coverage:
    """How much of the adapter and of the model was checked."""

    adapter_tensors: int = reported("Tensors in the adapter's file.", default=0)
    applied: int = reported("Tensors of the file that the merge used.", default=0)
    modules_merged: int = reported("Modules of the base that the adapter changes.", default=0)
    layers_in_blocks: int = reported("Layers that were merged in blocks of rows.", default=0)
    layers_by_peft: int = reported("Layers that only PEFT merged.", default=0)
    layers_witnessed: int = reported(
        "Layers in blocks that PEFT merged too, with the same bits (the cross-check): at least one of each kind.",
        default=0,
    )
    layers_differing: tuple[str, ...] = reported(
        "The first ten layers with other bits than PEFT's. If there is one, PEFT has merged all layers.", default=()
    )
    layers_proved: int = reported(
        "Layers whose merge was compared with the unmerged layer, and computes the same.", default=0
    )
    layers_not_proved: int = reported("Layers that PEFT merged, and that were not compared.", default=0)
    reasons_not_proved: tuple[str, ...] = reported("Why they were not compared.", default=())
    parameters_checked: int = reported(
        "Elements of the merged model that were checked; equal to `parameters_total` for every adapter that passed.",
        default=0,
    )
    parameters_total: int = reported("Elements of the merged model.", default=0)


@record
class Judged:
    """The time and place of a verdict, and its cache key."""

    key: str = reported("Digest of everything that decides the verdict: files, base, settings, versions.")
    at: str = reported("Time of the verdict, in UTC.")
    place: str = reported("The CI run, or the name of the machine.")
    seconds: float = reported("Seconds that the adapter took; null if they were not measured.")


@record
class Accepted:
    """The owner and the last day of a known failure."""

    reason: str = reported("Why it is accepted.")
    owner: str = reported("Who is responsible for it.")
    until: str = reported("The last day on which it is accepted; after that day the adapter fails the run.")


@record
class PublishedModel:
    """The directory that an adapter's merged model was published to."""

    directory: str = reported("The directory, as the option or the configuration names it, with the model's name.")
    dtype: str = reported("`preserve`, or the dtype that all floating tensors were cast to.")
    files: tuple[HashedFile, ...] = reported("Every file in it.")


@record
class AdapterReport:
    """One adapter on one base in one dtype. `line` and `column` are the entry's place in the YAML file.

    `decided_by` is the index of the finding that decided; None for a passed adapter. `seed` is the seed of a
    combination by a random method, with which a merge gives the same bits again.
    """

    name: str = reported("Its name in the configuration.")
    source: str = reported("Its path as written, or its Hub id.")
    revision: str | None = reported("The commit that a Hub id was resolved to; null for a directory.", default=None)
    base: BaseKey = reported("The base that it was merged into.")
    peft_type: str | None = reported(
        "PEFT's name of the method, such as `LORA`; null if it could not be read.", default=None
    )
    saved_by: str | None = reported(
        "Version of PEFT that saved it, by its adapter_config.json; null if the file does not give it (before PEFT "
        "0.18).",
        default=None,
    )
    verdict: Verdict = reported("`error` if it could not be judged. Only `passed` clears it.")
    cause: str | None = reported(
        "Id of the check that decided, nearest to the root; `not-judged` with the verdict `error`; null if it passed.",
        default=None,
    )
    failure: FailureKind | None = reported(
        "What the failure means: `broken` (the merged model is broken or wrong), `refused` (it was not loaded, because "
        "it is not safe), `not-mergeable`, or `unexpected` (it is not the one that was expected); null unless it "
        "failed.",
        default=None,
    )
    compared_with: str | None = reported(
        "The adapter whose merge the model was compared with, as named on the command line (`merge-gate verify`); null "
        "in any other report, and if only digests were compared.",
        default=None,
    )
    findings: tuple[Finding, ...] = reported("All findings, not only the cause.", default=())
    decided_by: int | None = None
    coverage: Coverage = reported("How much was checked.", default=Coverage())
    forward: Forward = reported(
        "What a run of base and adapter as models showed, and the comparison of merged and unmerged layers.",
        default=Forward(),
    )
    files: tuple[HashedFile, ...] = reported("The files that were read.", default=())
    seconds: float = reported("Seconds that the adapter took; null if they were not measured.", default=0.0)
    seed: int | None = reported(
        "The seed of a combination by a random method (`dare_…`); null for any other adapter.", default=None
    )
    line: int = reported("Line of its entry in the configuration file, counted from 1.")
    column: int = reported("Column of its entry, counted from 1.")
    tensors: tuple[TensorMerge, ...] = reported(
        "Every tensor that the merge touched, after the merge: `rows`, and the names of their `columns`. Figures are "
        "rounded to six significant digits.",
        default=(),
        as_rows=True,
    )
    judged: Judged | None = reported(
        "Time and place of the verdict; null if no later run can reuse it.",
        default=None,
    )
    cached: bool = reported(
        "Whether the verdict of an earlier run was reused (`--cache`); `seconds` is then 0.",
        default=False,
    )
    published: PublishedModel | None = reported(
        "The published model (`--publish`); null if it was not asked for, or could not be published.", default=None
    )
    accepted: Accepted | None = reported(
        "The acceptance of the failure, if the baseline has one; the verdict stays `failed`.", default=None
    )

    def __repr__(self) -> str:
        cause = f", cause={self.cause!r}" if self.cause else ""
        return (
            f"AdapterReport(name={self.name!r}, base={self.base.model!r}, dtype={self.base.dtype!r}, "
            f"verdict={self.verdict.value!r}{cause})"
        )


@record
class BaseReport:
    """One base that was loaded."""

    model: str = reported("Directory or Hub id as written.")
    revision: str | None = reported("The commit that a Hub id was resolved to; null for a directory.", default=None)
    dtype: str = reported("The dtype that was checked, in torch's words.")
    quantization: str = reported(
        "How the loaded base is quantized: `none`, `bnb-8bit`, `bnb-4bit`, or the method that the base declares, such "
        "as `fp8`; for a base that was not loaded, what the config asks for."
    )
    sha256: str | None = reported(
        "Digest of all its weight files: of the lines that sha256sum writes for `files`, hex; null if it was not "
        "computed.",
        default=None,
    )
    files: tuple[HashedFile, ...] = reported(
        "Its weight files, each with the digest that sha256sum and the Hub show; empty if they were not hashed.",
        default=(),
    )
    parameters: int = reported("Elements of all its parameters and persistent buffers.", default=0)
    findings: tuple[Finding, ...] = reported("Findings about the base itself, before any merge.", default=())
    dtypes: tuple[tuple[str, float], ...] = reported(
        "How many parameters have which dtype, if they are mixed; a packed weight has the name of its packing.",
        default=(),
    )
    loaded_as: str = reported("The class of transformers that loaded it.", default="")
    first_adapter: str = reported("The first adapter of the configuration that loaded it as this class.", default="")
    replaced: tuple[str, ...] = reported(
        "Tensors of its own head that were replaced, because the adapters have a head with another number of labels.",
        default=(),
    )
    no_skeleton: str = reported(
        "Why transformers itself loaded a base that is otherwise read tensor by tensor, because it is streamed, larger "
        "than the memory, or on a network mount; empty if it did not.",
        default="",
    )

    @property
    def key(self) -> BaseKey:
        return BaseKey(model=self.model, revision=self.revision, dtype=self.dtype, quantization=self.quantization)

    @property
    def bare(self) -> BaseReport:
        """The base without what one run adds to it: its digests, and the first adapter."""
        return replace(self, sha256=None, files=(), first_adapter="")


@record
class Sandbox:
    """The restrictions of the worker process (worker/sandbox.py)."""

    held: tuple[str, ...] = reported(
        "The restrictions in force: `files` (it writes only its own), `network` (none), `processes` (no other), "
        "`file size`, `memory`; empty if nothing was merged.",
        default=(),
    )
    missing: tuple[str, ...] = reported("The missing restrictions, each with its reason.", default=())


@record
class Environment:
    """The environment of the run. A version is None if the package is absent or was not needed."""

    python: str = reported("Version of Python.")
    torch: str | None = reported("Version of torch; null if it is absent.", default=None)
    peft: str | None = reported("Version of PEFT; null if it is absent.", default=None)
    transformers: str | None = reported("Version of transformers; null if it is absent.", default=None)
    bitsandbytes: str | None = reported("Version of bitsandbytes; null if it is absent.", default=None)
    device: str = reported("`cpu`, `cuda:0`, …", default="cpu")
    device_name: str = reported("The device's own name; may be empty.", default="")
    sandbox: Sandbox = reported("The restrictions of the process that merged.", default=Sandbox())


@record
class Shard:
    """The part of a larger run that a report covers, for `merge-gate report combine` (features/shards)."""

    index: int = reported("Its number, counted from 1.")
    count: int = reported("How many shards the run has.")
    plan_sha256: str = reported(
        "Digest of the plan: configuration, version of merge-gate, options, and the shard of each entry. Shards with "
        "different plans are not of the same run."
    )
    versions_sha256: str = reported(
        "Digest of merge-gate's own code and of the versions of all libraries that decide a verdict."
    )
    entries: int = reported("How many entries (adapters, times dtypes) the run has in all shards.")
    positions: tuple[int, ...] = reported(
        "Positions of this shard's entries in the run, counted from 0, in the order of `adapters`; empty if there are "
        "more shards than adapters.",
        default=(),
    )
    bases_from: tuple[int, ...] = reported(
        "For each of `bases`, the position of the first entry that was merged into it.", default=()
    )


@record
class Tool:
    """The program that wrote the report."""

    name: str = reported("Always `merge-gate`.")
    version: str = reported("Its version.")


@record
class ConfigFile:
    """The configuration file of the run."""

    path: str = reported("As named on the command line; `the command line` if the adapters are named there.")
    sha256: str = reported(
        "Digest of its bytes, hex; without a file, the digest of the named adapters, base and dtypes."
    )
    read_at: str | None = reported("Time at which the run read it, in UTC.", default=None)
    commit: str | None = reported(
        "Commit of the checkout, as CI names it (`MERGE_GATE_COMMIT`, `GITHUB_SHA`, `CI_COMMIT_SHA`, `GIT_COMMIT`, or "
        "`BUILD_SOURCEVERSION`); null elsewhere.",
        default=None,
    )
    policy: str = reported("The policy of the run: `default` or `release`.", default="default")


@record
class Counts:
    """The entries of `adapters` by verdict: one for each adapter, base and dtype."""

    passed: int = reported("Entries that passed.")
    failed: int = reported("Entries that failed.")
    error: int = reported("Entries that could not be judged.")


@record
class Report:
    """A run: the whole of report.json, with the fields in the order of the file.

    `schema_version`, `result`, `counts`, and `accepted` follow from the other fields. `shard` is None for a whole run,
    also for a combination of shards.
    """

    schema_version: str = reported("Version of this format. Readers accept any 1.x.", init=False)
    complete: bool = reported("False during the run, and forever if it was killed.")
    result: Result = reported(
        "The run's result. An unfinished run, or one that judged nothing, never passes.", init=False
    )
    counts: Counts = reported("Entries of `adapters` by verdict; an adapter has one for each dtype.", init=False)
    tool: Tool = reported("The program that wrote the report.")
    environment: Environment = reported("The environment of the run.")
    config: ConfigFile = reported("The configuration file.")
    files_only: bool = reported(
        "True for `merge-gate check`, which merges nothing: a `passed` adapter has sound files, and the values of its "
        "merge are unknown.",
        default=False,
    )
    is_comparison: bool = reported(
        "True for `merge-gate verify`: the entry of `adapters` is the model that was compared, and its `cause` is a "
        "kind of difference. It says nothing of a value that both models have.",
        default=False,
    )
    bases: tuple[BaseReport, ...] = reported("Every loaded base, once.", default=())
    adapters: tuple[AdapterReport, ...] = reported(
        "One entry per adapter, base and dtype, in the order of the file.", default=()
    )
    shard: Shard | None = reported(
        "The part of a larger run (`--shard`); null for a whole run, also for a combination of shards.",
        default=None,
    )
    accepted: int = reported(
        "How many failed entries the baseline accepts. If it accepts all of them, `result` can be `pass`.",
        default=0,
        init=False,
    )
    baseline: tuple[BaselineEntry, ...] = reported("The outcome of each entry of the baseline.", default=())
    problems: tuple[str, ...] = reported(
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

    def __repr__(self) -> str:
        """One line for each adapter: a report has thousands of fields."""
        adapters = "".join(f"\n  {adapter!r}," for adapter in self.adapters)
        return f"Report(result={self.result.value!r}, adapters=({adapters}{adapters and chr(10)}))"

    def _result(self) -> Result:
        """A failure that no one accepts outranks an adapter that was not judged.

        An empty or unfinished run never passes. A shard may have nothing to judge if there are more shards than
        adapters. Then it decides nothing: the combination counts the entries.
        """
        if self.counts.failed > self.accepted:
            return Result.FAIL
        if self.counts.error or not self.complete or self.problems:
            return Result.ERROR
        return Result.PASS if self.adapters or self.is_empty_shard else Result.ERROR

    @property
    def passed(self) -> bool:
        """Whether the result is `pass`: every adapter passed, or the baseline accepts its failure."""
        return self.result is Result.PASS

    @property
    def is_empty_shard(self) -> bool:
        return self.shard is not None and not self.shard.positions and self.shard.entries > 0
