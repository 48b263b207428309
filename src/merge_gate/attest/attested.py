"""The statements that `merge-gate attest` prints: about a published directory, or about each adapter of a report.

In: a path. Out: the bytes of statements. A directory is attested only if every file is as its merge-gate.json lists it.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate.attest import statement
from merge_gate.errors import UsageError
from merge_gate.publish.manifest import MANIFEST_NAME, MOST_BYTES, differences, parse_manifest
from merge_gate.records.terms import Verdict
from merge_gate.regular_file import read_regular_file
from merge_gate.report.stored.output_directory import explained_read
from merge_gate.report.stored.stored_report import with_digest
from merge_gate.report.wording.untrusted import one_line
from merge_gate.text import listing, quoted

if TYPE_CHECKING:
    from collections.abc import Collection
    from datetime import datetime

    from merge_gate.records.report import Report

_LISTED = 5


def statements_of(source: str, only: Collection[str], now: datetime, report: str | None = None) -> list[bytes]:
    """The statements about a published directory or a report, each on one line.

    Args:
        source: the directory, or the report.json of a run or its directory.
        only: names of adapters of the report; empty for all.
        now: the time of the statements.
        report: the report of the run that published the directory, or None.

    Raises:
        UsageError: there is nothing to attest, or it is not what it says.
    """
    if not os.path.lexists(Path(source, MANIFEST_NAME)):
        if report is not None:
            raise UsageError("--report needs a published directory", hint="a report is attested without it")
        return _of_report(source, only, now)
    if only:
        raise UsageError("--only needs a report", hint="a published directory has one adapter")
    return [_of_directory(Path(source), now, report)]


def _of_directory(folder: Path, now: datetime, report: str | None) -> bytes:
    with explained_read(f"cannot read {one_line(str(folder))}", "check that it is a published model and can be read"):
        data = read_regular_file(folder / MANIFEST_NAME, MOST_BYTES)
        manifest = parse_manifest(data, str(folder / MANIFEST_NAME))
        different = differences(folder, manifest)
    if different:
        shown = listing([f"{one_line(one.path, 120)} ({one.kind})" for one in different], _LISTED)
        raise UsageError(
            f"{one_line(str(folder))} differs from its {MANIFEST_NAME}: {shown}",
            hint="publish the adapter again; `merge-gate verify` shows what the directory is now",
        )
    digest = hashlib.sha256(data).hexdigest()
    report_sha256 = None if report is None else _digest_of_publishing(report, digest)
    return statement.render(statement.of_directory(manifest, digest, now, report_sha256))


def _digest_of_publishing(report: str, manifest_sha256: str) -> str:
    """The digest of a report whose run published a directory with this merge-gate.json."""
    run, digest = _attestable(report)
    passed = [adapter.published for adapter in run.adapters if adapter.verdict is Verdict.PASSED and adapter.published]
    if any(file.path == MANIFEST_NAME and file.sha256 == manifest_sha256 for model in passed for file in model.files):
        return digest
    raise UsageError(
        f"the report {quoted(report, 200)} has no adapter that passed and was published with this {MANIFEST_NAME}",
        hint="name the report of the run that published the directory",
    )


def _attestable(source: str) -> tuple[Report, str]:
    """A report with verdicts, and its digest."""
    report, digest = with_digest(source)
    if not report.complete:
        why = "a later command judged nothing" if report.stale else "its run did not finish"
        raise UsageError(f"the report is not complete: {why}", hint="run the gate again")
    if report.files_only:
        raise UsageError(
            "the report is from `merge-gate check`, which merges nothing", hint="attest the report of `merge-gate run`"
        )
    if report.is_comparison:
        raise UsageError(
            "the report is from `merge-gate verify`, which gates no adapter",
            hint="attest the published directory, or the report of `merge-gate run`",
        )
    if not report.adapters:
        raise UsageError("the report has no adapters, so there is nothing to attest")
    return report, digest


def _of_report(source: str, only: Collection[str], now: datetime) -> list[bytes]:
    report, digest = _attestable(source)
    unknown = sorted(set(only) - {adapter.name for adapter in report.adapters})
    if unknown:
        raise UsageError(
            f"the report has no adapter {quoted(unknown[0])}", hint="`merge-gate report show` lists its adapters"
        )
    chosen = [adapter for adapter in report.adapters if not only or adapter.name in only]
    return [statement.render(statement.of_adapter(report, adapter, now, digest)) for adapter in chosen]
