"""The record of merge-gate.json, the file that describes a published directory and how it was made."""

from __future__ import annotations

from merge_gate.records.config import Combine
from merge_gate.records.files import FileRecord
from merge_gate.records.report import ConfigFile, Report, Tool
from merge_gate.records.terms import ForwardMode, Quantization, Verdict, record, reported

MANIFEST_VERSION = "1.0"
CARD_NAME = "README.md"


@record
class PublishedBase:
    """The base of a published merge."""

    model: str = reported("Directory or Hub id as written.")
    revision: str | None = reported("The commit of a Hub id; null for a directory.", default=None)
    dtype: str = reported("The dtype that it was loaded and merged in.")
    quantization: str = reported("How the loaded base is quantized; `none` if it is not.")
    requested_dtype: str = reported("The dtype that was asked for: `auto`, or a name.", default="auto")
    requested_quantization: Quantization = reported("The quantization that was asked for.", default=Quantization.NONE)
    names: tuple[str, ...] = reported("Other names for it, which the configuration accepts.", default=())
    sha256: str = reported("Digest of its weights, hex, as in report.json.")
    files: tuple[FileRecord, ...] = reported(
        "Its weight files; of a published model also its settings, tokenizer, and all other files that were copied.",
        default=(),
    )


@record
class PublishedAdapter:
    """An adapter of a published merge; a combination has several."""

    name: str = reported("Its name in the configuration.")
    source: str = reported("Its path as written, or its Hub id.")
    revision: str | None = reported("The commit of a Hub id; null for a directory.", default=None)
    files: tuple[FileRecord, ...] = reported(
        "The files that were merged; of a published model also its tokenizer and all other files that were copied."
    )


@record
class Versions:
    """The versions that made a merge. A version is null if the package was not used."""

    python: str = reported("Version of Python.")
    torch: str | None = reported("Version of torch.", default=None)
    peft: str | None = reported("Version of PEFT.", default=None)
    transformers: str | None = reported("Version of transformers.", default=None)
    bitsandbytes: str | None = reported("Version of bitsandbytes.", default=None)
    device: str = reported("Where the merge was computed: `cpu`, `cuda:0`, …", default="cpu")


@record
class Manifest:
    """merge-gate.json: what a published directory holds, and what it was made of. It has no time and no host name.

    `schema_version` follows from the version of merge-gate.
    """

    schema_version: str = reported("Version of this format. Readers accept any 1.x.", default=MANIFEST_VERSION)
    tool: Tool = reported("The program that published the merge.")
    name: str = reported("The adapter's name in the configuration.")
    verdict: Verdict = reported("Always `passed`.")
    warnings: tuple[str, ...] = reported("The checks with warnings, by id.", default=())
    parameters: int = reported("How many parameters of the merged model were checked: all of them.")
    peft_type: str | None = reported("PEFT's name of the method, such as `LORA`.", default=None)
    dtype: str = reported("`preserve` if every tensor has the dtype of the base's file; else the dtype of the cast.")
    max_shard_bytes: int | None = reported(
        "The largest size of a shard that was asked for; null if the shards are those of the base.", default=None
    )
    base: PublishedBase = reported("The base.")
    adapters: tuple[PublishedAdapter, ...] = reported("The adapter, or the members of a combination.")
    combination: Combine | None = reported("How the members were combined.", default=None)
    allow_pickle: bool = reported("Whether pickled weights were allowed.", default=False)
    trust_remote_code: bool = reported("Whether code of the base was allowed to run.", default=False)
    config: ConfigFile = reported("The configuration file.")
    versions: Versions = reported("The versions that made the merge.")
    forward: ForwardMode = reported("The setting `forward`, which decides some warnings.", default=ForwardMode.AUTO)
    checks: tuple[str, ...] = reported(
        "The checks that the configuration changed, with severity and limits: `keys-unexpected=off`.", default=()
    )
    files: tuple[FileRecord, ...] = reported("Every file of the directory except merge-gate.json itself.", default=())


EXPORT_VERSION = "1.0"


@record
class MergeComparison:
    """The merge of an export, compared with the merge of its adapter, in one dtype."""

    dtype: str = reported("The dtype of the base in which both were merged.")
    tensors: int = reported("How many stored tensors the adapter changes.")
    values: int = reported("How many values these have.")
    differing: int = reported("How many of the values differ, by rounding; 0 if both merges have equal bits.")
    largest: float = reported("The largest difference.")


@record
class ExportRecord:
    """merge-gate-export.json: what an exported adapter was made of. It has no time and no host name."""

    schema_version: str = reported("Version of this format. Readers accept any 1.x.", default=EXPORT_VERSION)
    tool: Tool = reported("The program that exported the adapter.")
    adapter: PublishedAdapter = reported("The adapter.")
    base: PublishedBase = reported("The base that both were merged into.")
    versions: Versions = reported("The versions that merged both.")
    model_class: str = reported("The class that users of the adapter load, whose names the export has.")
    renamed: tuple[str, ...] = reported("Tensors of the adapter whose names were repaired.", default=())
    padding: tuple[str, ...] = reported("Modules that the adapter leaves alone: their factors are zeros.", default=())
    scale_in: str = reported("Where the scale is: `lora_alpha`, or `lora_B` (in float32).")
    comparisons: tuple[MergeComparison, ...] = reported("How the merges differ, for each dtype.", default=())
    files: tuple[FileRecord, ...] = reported("The other files of the directory.", default=())
    sha256: str = reported("The SHA-256 of this file with an empty text in this place.", default="")


@record
class Export:
    """The report on an export, and its record. Without a record, the report is on what did not pass."""

    report: Report
    record: ExportRecord | None = None


@record
class Predicate:
    """The predicate of an in-toto statement: a verdict, and what it rests on (docs/guides/attestations.md)."""

    attested_at: str = reported("When the statement was made, in UTC: `2026-11-27T20:15:00Z`.")
    published: bool = reported(
        "True if the subjects are the files of a published model; false if they are the adapter's own files."
    )
    tool: Tool = reported("The program that made the statement.")
    name: str = reported("The adapter's name in the configuration.")
    verdict: Verdict = reported("The verdict on the merge.")
    cause: str | None = reported("Id of the check that decided; null if the adapter passed.", default=None)
    warnings: tuple[str, ...] = reported("The checks with warnings, by id.", default=())
    parameters: int = reported("How many parameters of the merged model were checked.")
    peft_type: str | None = reported("PEFT's name of the method, such as `LORA`.", default=None)
    dtype: str | None = reported("The dtype of the published tensors, or `preserve`; null if nothing was published.")
    base: PublishedBase = reported("The base.")
    adapters: tuple[PublishedAdapter, ...] = reported("The adapter, or the members of a combination.", default=())
    config: ConfigFile = reported("The configuration file.")
    versions: Versions = reported("The versions that made the merge.")
    checks: tuple[str, ...] = reported("The checks of a published model that the configuration changed.", default=())
    verdict_from: str = reported(
        "`report.json`, or `merge-gate.json`, which anyone who can write to the directory can write.",
        default="merge-gate.json",
    )
