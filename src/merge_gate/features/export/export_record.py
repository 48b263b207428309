"""merge-gate-export.json: what an exported adapter was made of, written and read back."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from merge_gate._internal.regular_file import read_regular_file
from merge_gate.features.publish.manifest import (
    MOST_BYTES,
    PublishedAdapter,
    PublishedBase,
    Versions,
    compared,
    rendered,
)
from merge_gate.records.files import EXPORT_NAME, HashedFile
from merge_gate.records.report import TOOL, Report, Tool
from merge_gate.records.terms import record, reported
from merge_gate.report.formats.fields import dump_record, load_document

EXPORT_VERSION, LISTING = "1.0", EXPORT_NAME


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
    files: tuple[HashedFile, ...] = reported("The other files of the directory.", default=())
    sha256: str = reported("The SHA-256 of this file with an empty text in this place.", default="")


@record
class Export:
    """The report on an export, and its record. Without a record, the report is on what did not pass."""

    report: Report
    record: ExportRecord | None = None


def render(facts: ExportRecord) -> bytes:
    """The bytes of merge-gate-export.json. Its `sha256` is the digest of these bytes with an empty one in its place."""
    empty = rendered(dump_record(replace(facts, sha256="")))
    return rendered(dump_record(replace(facts, sha256=hashlib.sha256(empty).hexdigest())))


def is_unchanged(folder: Path, *, weights: bool) -> bool:  # noqa: ARG001 - all files of an adapter are read
    """Whether a directory holds what its merge-gate-export.json lists, and nothing else.

    Raises:
        OSError, UnreadableError: it has no such file, or another one.
    """
    data = read_regular_file(folder / EXPORT_NAME, MOST_BYTES)
    facts: ExportRecord = load_document(ExportRecord, data, EXPORT_VERSION, TOOL)
    return data == render(facts) and not dict(compared(folder, facts.files, EXPORT_NAME))
