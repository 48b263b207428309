"""Makes in-toto statements about the verdicts of a report, or about a published directory. Other tools sign them.

In: the path of a report or of a directory with merge-gate.json. Out: the bytes of statements. A directory is attested
only if every file is as its merge-gate.json lists it.
"""

from __future__ import annotations

import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate import __version__
from merge_gate._internal.errors import UsageError
from merge_gate._internal.regular_file import read_regular_file
from merge_gate._internal.text import listing, quoted
from merge_gate.features.publish.manifest import (
    MOST_BYTES,
    Manifest,
    PublishedAdapter,
    PublishedBase,
    Versions,
    differences,
    parse_manifest,
    shared_fields,
    versions_of,
    warnings_in,
)
from merge_gate.records.files import MANIFEST_NAME
from merge_gate.records.report import TOOL, AdapterReport, ConfigFile, Report, Tool
from merge_gate.records.terms import Verdict, record, reported
from merge_gate.report.formats.fields import dump_record
from merge_gate.report.stored.output_directory import explained
from merge_gate.report.stored.stored_report import stored
from merge_gate.report.wording.untrusted import one_line

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from merge_gate.records.files import HashedFile

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:merge-gate:verdict:1"
MOST_SUBJECTS = 1024
"""What actions/attest allows, as well as the limit on the size (`MOST_BYTES`)."""

_LISTED = 5


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


@record
class Statement:
    """One in-toto statement. `subjects` has the SHA-256 of each file, by its name relative to the directory."""

    subjects: Mapping[str, str]
    predicate: Predicate


def statements_of(source: str, only: Collection[str], now: datetime) -> list[bytes]:
    """The statements about a published directory or a report, each on one line.

    Args:
        source: the directory, or the report.json of a run or its directory.
        only: names of adapters of the report; empty for all.
        now: the time of the statements.

    Raises:
        UsageError: there is nothing to attest, or it is not what it says.
    """
    if not os.path.lexists(Path(source, MANIFEST_NAME)):
        return _of_report(source, only, now)
    if only:
        raise UsageError("--only needs a report", hint="a published directory has one adapter")
    return [_of_directory(Path(source), now)]


def _of_directory(folder: Path, now: datetime) -> bytes:
    with explained(f"cannot read {one_line(str(folder))}", "check that it is a published model and can be read"):
        data = read_regular_file(folder / MANIFEST_NAME, MOST_BYTES)
        manifest = parse_manifest(data, str(folder / MANIFEST_NAME))
        different = differences(folder, manifest)
    if different:
        shown = listing([f"{one_line(name, 120)} ({how})" for name, how in different.items()], _LISTED)
        raise UsageError(
            f"{one_line(str(folder))} differs from its {MANIFEST_NAME}: {shown}",
            hint="publish the adapter again; `merge-gate verify` shows what the directory is now",
        )
    return render(_of_manifest(manifest, hashlib.sha256(data).hexdigest(), now))


def _of_report(source: str, only: Collection[str], now: datetime) -> list[bytes]:
    report = stored(source)
    of_run = "the report of `merge-gate run`"
    for is_so, problem, hint in (
        (not report.complete, "is not complete: its run did not finish", "run the gate again"),
        (report.files_only, "is from `merge-gate check`, which merges nothing", f"attest {of_run}"),
        (
            report.is_comparison,
            "is from `merge-gate verify`, which gates no adapter",
            f"attest the published directory, or {of_run}",
        ),
        (not report.adapters, "has no adapters, so there is nothing to attest", ""),
    ):
        if is_so:
            raise UsageError(f"the report {problem}", hint=hint)
    unknown = sorted(set(only) - {adapter.name for adapter in report.adapters})
    if unknown:
        raise UsageError(
            f"the report has no adapter {quoted(unknown[0])}", hint="`merge-gate report show` lists its adapters"
        )
    chosen = [adapter for adapter in report.adapters if not only or adapter.name in only]
    return [render(_of_adapter(report, adapter, now)) for adapter in chosen]


def _of_manifest(manifest: Manifest, manifest_sha256: str, now: datetime) -> Statement:
    """The statement about a published directory, whose files are as the manifest lists them."""
    return Statement(
        subjects=_digests(manifest.files) | {MANIFEST_NAME: manifest_sha256},
        predicate=Predicate(
            attested_at=_time(now),
            published=True,
            **shared_fields(Predicate, manifest) | {"tool": Tool(name=TOOL, version=__version__)},
        ),
    )


def _of_adapter(report: Report, adapter: AdapterReport, now: datetime) -> Statement:
    """The statement about one entry of a report. Its subjects are the adapter's own files."""
    base = next((base for base in report.bases if base.key == adapter.base), None)
    return Statement(
        subjects=_digests(adapter.files),
        predicate=Predicate(
            attested_at=_time(now),
            published=False,
            tool=Tool(name=TOOL, version=__version__),
            name=adapter.name,
            verdict=adapter.verdict,
            cause=adapter.cause,
            warnings=warnings_in(adapter.findings),
            parameters=adapter.coverage.parameters_checked,
            peft_type=adapter.peft_type,
            dtype=None,
            base=PublishedBase(
                model=adapter.base.model or "",
                revision=adapter.base.revision,
                dtype=adapter.base.dtype,
                quantization=adapter.base.quantization,
                sha256=(base.sha256 if base is not None else None) or "",
                files=base.files if base is not None else (),
            ),
            adapters=(PublishedAdapter(**shared_fields(PublishedAdapter, adapter)),),
            config=report.config,
            versions=versions_of(report.environment, adapter.base),
            verdict_from="report.json",
        ),
    )


def render(statement: Statement) -> bytes:
    """The bytes of a statement, on one line of ASCII.

    Raises:
        UsageError: it has no subjects, or more than a statement may have, or is too large.
    """
    name = one_line(statement.predicate.name, 80)
    if not statement.subjects:
        raise UsageError(
            f"the adapter {name} has no files in the report, so a statement about it would be about nothing",
            hint="choose the adapters to attest with --only",
        )
    if len(statement.subjects) > MOST_SUBJECTS:
        raise UsageError(
            f"the model {name} has {len(statement.subjects):,} files, and a statement has at most {MOST_SUBJECTS:,}",
            hint="publish it with a larger --max-shard-size",
        )
    document = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": sha256}} for name, sha256 in statement.subjects.items()],
        "predicateType": PREDICATE_TYPE,
        "predicate": dump_record(statement.predicate),
    }
    data = json.dumps(document, allow_nan=False).encode("ascii")
    if len(data) > MOST_BYTES:
        raise UsageError(
            f"the statement about {name} would have {len(data):,} bytes, and a statement has at most {MOST_BYTES:,}"
        )
    return data


def _digests(files: Iterable[HashedFile]) -> dict[str, str]:
    return {file.path: file.sha256 for file in files}


def _time(now: datetime) -> str:
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
