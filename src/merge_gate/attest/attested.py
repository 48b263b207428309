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
from merge_gate.regular_file import read_regular_file
from merge_gate.report.stored.output_directory import explained
from merge_gate.report.stored.stored_report import stored
from merge_gate.report.wording.untrusted import one_line
from merge_gate.text import listing, quoted

if TYPE_CHECKING:
    from collections.abc import Collection
    from datetime import datetime

_LISTED = 5


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
        shown = listing([f"{one_line(one.path, 120)} ({one.kind})" for one in different], _LISTED)
        raise UsageError(
            f"{one_line(str(folder))} differs from its {MANIFEST_NAME}: {shown}",
            hint="publish the adapter again; `merge-gate verify` shows what the directory is now",
        )
    return statement.render(statement.of_directory(manifest, hashlib.sha256(data).hexdigest(), now))


def _of_report(source: str, only: Collection[str], now: datetime) -> list[bytes]:
    report = stored(source)
    why = "a later command judged nothing" if report.stale else "its run did not finish"
    of_run = "the report of `merge-gate run`"
    for is_so, problem, hint in (
        (not report.complete, f"is not complete: {why}", "run the gate again"),
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
    return [statement.render(statement.of_adapter(report, adapter, now)) for adapter in chosen]
