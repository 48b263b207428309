"""The report on one finished directory: its findings, its verdict, and the cause.

In: an `Entry` with the adapter, the evidence of its merge, and the findings of this folder. Out: `AdapterReport`.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace

from merge_gate.judging import adapter_report, all_checks
from merge_gate.judging.limits import bounded
from merge_gate.judging.not_judged import not_judged
from merge_gate.records.comparison import Comparison
from merge_gate.records.files import BaseFiles, Entry, Snapshot
from merge_gate.records.measured import Evidence
from merge_gate.records.report import AdapterReport
from merge_gate.records.terms import Finding, Origin, Severity, Verdict
from merge_gate.text import counted, listing, quoted, verb
from merge_gate.verify.kinds import KINDS, finding
from merge_gate.verify.settings import settings_findings
from merge_gate.verify.stored_names import stored_findings
from merge_gate.verify.values import value_findings

_ORDER = {kind: number for number, kind in enumerate(KINDS)}
_WEIGHT = {Severity.ERROR: 0, Severity.WARNING: 1, Severity.NOTE: 2}


def findings_of(
    merged: Snapshot, entry: Entry, comparison: Comparison, candidates: Mapping[str, Comparison]
) -> tuple[Finding, ...]:
    """Every finding on a finished directory that could be compared with a merge."""
    if comparison.unloadable is not None:
        why = all_checks.refused(comparison.unloadable)
        return (finding("broken-files", f"the directory cannot be loaded: {why.message}", hint=why.hint),)
    base = entry.base_files or BaseFiles(directory="")
    own = merged.base_files or BaseFiles(directory=merged.directory)
    directories = merged.directory, entry.base.directory if entry.base is not None else "", entry.files.directory
    return (
        *value_findings(comparison, config=entry.files.config, candidates=candidates),
        *stored_findings(base, own, comparison),
        *_settings(comparison),
        *settings_findings(*directories),
    )


def _settings(comparison: Comparison) -> Iterator[Finding]:
    odd = comparison.settings
    if odd:
        shown = [f"{quoted(key, 80)} is {quoted(new, 80)}, expected {quoted(old, 80)}" for key, old, new in odd]
        yield finding(
            "config-differs",
            f"{counted(len(odd), 'key')} of config.json {verb(len(odd), 'differs', 'differ')}: {listing(shown, 5)}",
        )


def compared_report(
    merged: Snapshot, entry: Entry, evidence: Evidence, findings: Iterable[Finding], allowed: Collection[str]
) -> AdapterReport:
    """The report on a directory whose merge was made. A merge that the gate would fail fails the directory too."""
    gated = adapter_report.merged_report(entry, evidence)
    if evidence.refusal is not None:
        return without_merge(merged, gated)
    return decided(merged, gated, (*gated.findings, *findings), allowed)


def without_merge(merged: Snapshot, gated: AdapterReport) -> AdapterReport:
    """The report on a directory that nothing could be compared with. `gated` says why."""
    why = not_judged(
        f"the directory was not compared: the adapter {gated.name} cannot be merged",
        "see the other findings; `merge-gate run` gates the adapter",
    )
    named = replace(gated, name=merged.name, source=merged.name)
    return replace(named, verdict=Verdict.ERROR, cause=why.check, findings=(why, *gated.findings), decided_by=0)


def decided(
    merged: Snapshot, gated: AdapterReport, findings: Iterable[Finding], allowed: Collection[str]
) -> AdapterReport:
    """The report with these findings. Allowed kinds are notes."""
    lowered = (replace(one, severity=Severity.NOTE) if one.check in allowed else one for one in findings)
    ordered = bounded(sorted(lowered, key=lambda one: (_WEIGHT[one.severity], _ORDER.get(one.check, -1))))
    index = next((place for place, one in enumerate(ordered) if one.severity is Severity.ERROR), None)
    is_of_base = index is not None and ordered[index].origin is Origin.BASE
    verdict = Verdict.PASSED if index is None else Verdict.ERROR if is_of_base else Verdict.FAILED
    return replace(
        gated,
        name=merged.name,
        source=merged.name,
        revision=merged.revision,
        verdict=verdict,
        cause=None if index is None else ordered[index].check,
        findings=ordered,
        decided_by=index,
    )
