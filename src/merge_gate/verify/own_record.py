"""Compares a published directory with its own merge-gate.json: every file, by its digest.

In: a directory of unknown origin. Out: an `AdapterReport`. Imports no torch. merge-gate.json is not signed, and anyone
who can write the files can write it, too. An attestation proves who wrote it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from merge_gate.judging.answer_kinds import finding
from merge_gate.judging.limits import cut
from merge_gate.publish.manifest import MANIFEST_NAME, FileDifference, differences, read_manifest
from merge_gate.records.files import Snapshot
from merge_gate.records.publication import Manifest
from merge_gate.records.report import AdapterReport, Coverage
from merge_gate.records.terms import BaseKey, Finding, Verdict
from merge_gate.report.wording.untrusted import one_line
from merge_gate.text import counted, listing, quoted
from merge_gate.verify.answer import decided

_LISTED = 5


def recorded_report(name: str, directory: str, allowed: Collection[str]) -> AdapterReport:
    """The report on a directory that is compared with its own record.

    Raises:
        UsageError: there is no record, or it is none of merge-gate.
        OSError: a file cannot be read.
    """
    manifest = read_manifest(directory)
    odd = differences(directory, manifest)
    found = tuple(_findings(manifest, odd))
    different = {one.path for one in odd}
    same = tuple(file for file in manifest.files if file.path not in different)
    gated = replace(_undecided(manifest), files=same)  # of the others, the listed digest is not the file's
    return decided(Snapshot(name=name, directory=directory), gated, found, allowed)


def _undecided(manifest: Manifest) -> AdapterReport:
    base = manifest.base
    return AdapterReport(
        name=manifest.name,
        source=manifest.adapters[0].source,
        base=BaseKey(model=cut(base.model), revision=base.revision, dtype=base.dtype, quantization=base.quantization),
        peft_type=manifest.peft_type,
        verdict=Verdict.ERROR,
        coverage=Coverage(),
        line=1,
        column=1,
    )


def _findings(manifest: Manifest, odd: tuple[FileDifference, ...]) -> list[Finding]:
    if not odd:
        message = f"{counted(len(manifest.files), 'file has', 'files have')} the digests in {MANIFEST_NAME}"
        if manifest.checks:
            message += f". It was judged with changed checks: {one_line(listing(manifest.checks), 400)}"
        return [finding("as-published", message)]
    shown = listing([f"{quoted(one.path, 120)} is {one.kind}" for one in odd], _LISTED)
    message = f"{counted(len(odd), 'file differs', 'files differ')} from {MANIFEST_NAME}: {shown}"
    return [finding("file-changed", message, files=len(odd))]
