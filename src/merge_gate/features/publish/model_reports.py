"""The report of an adapter, with what became of its model."""

from __future__ import annotations

from dataclasses import replace

from merge_gate._internal.text import quoted
from merge_gate.features.publish.declared import EARLIER_MODEL, NOT_PUBLISHED
from merge_gate.judging import kinds, verdict
from merge_gate.judging.limits import bounded
from merge_gate.records.report import AdapterReport, PublishedModel
from merge_gate.records.terms import Finding, Origin


def published_report(report: AdapterReport, model: PublishedModel, findings: tuple[Finding, ...]) -> AdapterReport:
    """The report of an entry whose merge was published. `findings` are notes and warnings on the published files."""
    return replace(report, published=model, findings=(*report.findings, *bounded(findings)))


def unpublished_report(report: AdapterReport, message: str, hint: str) -> AdapterReport:
    """The report of an entry that passed, and whose merge could not be published."""
    said = f"the merge passed, and was not published: {message}"
    why = kinds.finding(NOT_PUBLISHED, said, hint=hint, origin=Origin.RUNTIME)
    what, index, findings = verdict.decide((*bounded([why]), *report.findings), report.coverage)
    return replace(
        report,
        verdict=what,
        cause=None if index is None else findings[index].check,
        decided_by=index,
        findings=findings,
    )


def report_with_earlier_model(report: AdapterReport, directory: str) -> AdapterReport:
    """The report of an entry that has no new model, while `directory` has the one of an earlier run."""
    warning = kinds.finding(
        EARLIER_MODEL,
        f"{quoted(directory, 200)} still has the model of an earlier run: this run has published nothing there",
        hint="do not use it for this adapter: remove it, or publish again when the adapter passes",
        origin=Origin.RUNTIME,
    )
    return replace(report, findings=(*report.findings, *bounded([warning])))
