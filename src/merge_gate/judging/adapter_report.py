"""One entry of the plan → its entry in the report, with findings, verdict and coverage.

In: an `Entry`, and its `Evidence` or the refusal that explains why there is none. Out: `AdapterReport` or `BaseReport`.
Imports no torch and opens no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from merge_gate.judging import all_checks, verdict
from merge_gate.judging.bounds import MOST_FINDINGS, bounded, cut
from merge_gate.judging.checks import (
    base_format,
    base_incomplete,
    base_inconsistent,
    base_nonfinite,
    expectation_failed,
)
from merge_gate.judging.checks.base_mismatch import base_mismatch
from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.not_judged import not_judged
from merge_gate.records.files import BaseFiles, Entry
from merge_gate.records.measured import BaseFacts, Evidence, Forward
from merge_gate.records.refusals import NotJudged, Refusal
from merge_gate.records.report import AdapterReport, BaseReport, Coverage
from merge_gate.records.terms import BaseKey, FailureKind, Finding, ForwardMode, Origin, Severity, Verdict


def blocked_report(entry: Entry) -> AdapterReport | None:
    """The report of an entry that its files alone keep from being merged; None if it may be merged."""
    findings = _file_findings(entry)
    if any(finding.severity is Severity.ERROR and not _allows_merging(finding) for finding in findings):
        return _judged(entry, findings)
    unsafe = [finding for finding in entry.files.findings if not _allows_loading(finding)]
    if not unsafe:
        return None
    why = not_judged(
        f"not merged, since {unsafe[0].check} was found (its severity in the config does not make it loadable)",
        unsafe[0].hint,
    )
    return _judged(entry, (*findings, why))


def with_base_digests(entry: Entry, got: Mapping[str, str] | None) -> Entry:
    """The entry, with what the digests of its base say. `got` is None if the base could not be hashed."""
    if got is None:
        why = "the base is pinned, and its SHA-256 could not be computed"
        return replace(entry, problem=not_judged(why, "check that nothing writes to the base, and that it can be read"))
    first, *others = entry.members
    findings = (*first.findings, *bounded(expectation_failed.other_base(entry.spec.base, got)))
    return replace(entry, members=(replace(first, findings=findings), *others))


def other_base_report(entry: Entry) -> AdapterReport | None:
    """The report of an entry whose base is not the pinned one; None if it is, or if that is no error."""
    findings = _file_findings(entry)
    check = expectation_failed.expectation_failed.id
    is_other = any(
        finding.check == check and finding.origin is Origin.BASE and finding.severity is Severity.ERROR
        for finding in findings
    )
    return _judged(entry, findings) if is_other else None


def _allows_merging(finding: Finding) -> bool:
    return finding.check in CHECKS and CHECKS[finding.check].allows_merging


def _allows_loading(finding: Finding) -> bool:
    """Whatever severity the config gives it; what the table does not know, PEFT does not see."""
    return finding.check in CHECKS and CHECKS[finding.check].allows_loading


def merged_report(entry: Entry, evidence: Evidence) -> AdapterReport:
    """The report of an entry that was merged, or whose merge was refused."""
    findings = all_checks.judge_merge(entry.spec, entry.files, evidence)
    coverage, forward = _coverage(evidence), _bounded(evidence.forward)
    forward = replace(forward, why_not=entry.no_forward or forward.why_not)
    is_whole = forward.ran and not (forward.missing or forward.not_run)
    if entry.spec.forward is ForwardMode.REQUIRED and not is_whole and evidence.refusal is None:
        why = f"the model was not run, which forward: required asks for: {forward.why_not or 'no reason is known'}"
        if forward.ran:
            why = "the merged model was not run, which forward: required asks for: memory did not suffice, or it failed"
        if forward.not_run:
            ran = f"{forward.modules_run} of the adapter's {forward.modules} modules ran"
            why = f"{ran}, and forward: required asks for all: not {', '.join(forward.not_run)}; {forward.why_not}"
        hint = "set forward: auto if a verdict without this measurement is enough"
        findings = (*bounded([not_judged(why, hint)]), *findings)
    return replace(
        _report(entry, coverage, *verdict.decide(findings, coverage)),
        base=evidence.base.key,
        seconds=evidence.seconds,
        seed=evidence.seed,
        forward=forward,
        tensors=evidence.merges,
    )


def _bounded(forward: Forward) -> Forward:
    """A measurement whose texts are cut: they come from the base's names, and from what its code raised."""
    values = ((field.name, getattr(forward, field.name)) for field in fields(forward))
    texts: dict[str, Any] = {name: cut(value) for name, value in values if isinstance(value, str)}
    texts |= {name: tuple(map(cut, getattr(forward, name))) for name in ("not_run", "not_counted")}
    return replace(forward, **texts)


def not_judged_report(entry: Entry, refusal: Refusal | NotJudged) -> AdapterReport:
    """The report of an entry that the gate could not judge."""
    return _judged(entry, (*_file_findings(entry), *bounded([all_checks.refused(refusal)])))


def withdrawn_report(entry: Entry, refusal: Refusal | NotJudged) -> AdapterReport:
    """The report of an entry whose measurements turned out to count for nothing, good or bad."""
    return _judged(entry, bounded([all_checks.refused(refusal)]))


_REASON_CHARACTERS = 400
_OF_BASES = (base_incomplete, base_inconsistent, base_nonfinite)


def base_report(facts: BaseFacts, files: BaseFiles | None = None) -> BaseReport:
    """The entry of a base that was loaded, with the notes on its files."""
    notes = files.notes if files is not None else ()
    shared = {field.name: getattr(facts, field.name) for field in fields(BaseReport) if hasattr(facts, field.name)}
    findings = bounded([*(finding for check in _OF_BASES for finding in check.of_base(facts)), *notes])
    texts = {"no_skeleton": facts.no_skeleton[:_REASON_CHARACTERS], "loaded_as": cut(facts.loaded_as)}
    replaced = tuple(map(cut, facts.replaced[:MOST_FINDINGS]))
    dtypes = tuple((cut(dtype), count) for dtype, count in facts.dtypes[:MOST_FINDINGS])
    return BaseReport(**shared | texts | {"replaced": replaced, "dtypes": dtypes, "findings": findings})


def refused_base_report(asked: BaseKey, refusal: Refusal | NotJudged) -> BaseReport | None:
    """The entry of a base that could not be loaded; None if a check of bases did not decide that."""
    finding = all_checks.refused(refusal)
    return unloaded_base_report(asked, bounded([finding])) if finding.check in CHECKS else None


def unloaded_base_report(asked: BaseKey, findings: tuple[Finding, ...]) -> BaseReport:
    """The entry of a base that its files keep from being loaded; `dtype` and `quantization` are the requested ones."""
    return BaseReport(
        model=asked.model or "",
        revision=asked.revision,
        dtype=asked.dtype,
        quantization=asked.quantization,
        findings=findings,
    )


def files_report(entry: Entry) -> AdapterReport:
    """The report on an adapter's files alone; its verdict says nothing of values."""
    findings = _file_findings(entry)
    coverage = Coverage(adapter_tensors=len(entry.files.tensors))
    return _report(entry, coverage, *verdict.decide_files(findings), findings)


def _file_findings(entry: Entry) -> tuple[Finding, ...]:
    """What the files of the adapter and of its base say, without a merge."""
    if entry.problem is not None and not entry.members:
        return (entry.problem,)
    judged = all_checks.judge_files(entry.spec, entry.files)
    is_read = entry.spec.base.model or entry.files.config.digest
    problems = () if entry.problem is None else (entry.problem,)
    if not is_read and any(finding.severity is Severity.ERROR for finding in judged):
        problems = ()  # a file that cannot be read does not name a base either
    of_base = base_findings(entry)
    if problems or any(finding.severity is Severity.ERROR for finding in of_base):
        # The question is not whether a base that cannot be read has the right name.
        mismatch = base_mismatch.id
        judged = tuple(each for each in judged if each.check != mismatch or each.severity is Severity.ERROR)
    return (*judged, *problems, *of_base)


def base_findings(entry: Entry) -> tuple[Finding, ...]:
    """What keeps any adapter from being judged on the base in this dtype, by the base's files alone."""
    files = entry.base_files
    if files is None:
        return ()
    asked = base_format.of_request(entry.spec.base, files)
    of_dtype = files.auto_dtype if entry.dtype == "auto" else None
    return bounded([*files.findings, *(finding for finding in (asked, of_dtype) if finding is not None)])


def _judged(entry: Entry, findings: tuple[Finding, ...]) -> AdapterReport:
    coverage = Coverage(adapter_tensors=len(entry.files.tensors))
    return _report(entry, coverage, *verdict.decide(findings, coverage))


def _report(
    entry: Entry, coverage: Coverage, what: Verdict, index: int | None, findings: tuple[Finding, ...]
) -> AdapterReport:
    """The report of an entry, without the figures of a merge, which `merged_report` adds."""
    spec, files = entry.spec, entry.files
    name = spec.base.label or spec.base.model or files.config.base_name
    return AdapterReport(
        name=spec.name,
        source=spec.source,
        revision=entry.revision,
        base=replace(spec.base.key(entry.dtype), model=cut(name) if name else None),
        peft_type=cut(files.config.peft_type) if files.config.peft_type else None,
        saved_by=cut(files.config.peft_version) if files.config.peft_version else None,
        verdict=what,
        cause=None if index is None else findings[index].check,
        failure=_failure(findings[index].check) if index is not None and what is Verdict.FAILED else None,
        findings=findings,
        decided_by=index,
        coverage=coverage,
        files=files.files,
        line=spec.line,
        column=spec.column,
    )


def _failure(cause: str) -> FailureKind:
    return CHECKS[cause].failure if cause in CHECKS else FailureKind.BROKEN


def _coverage(evidence: Evidence) -> Coverage:
    tensors = len(evidence.file_tensors)
    refused = evidence.refusal is not None
    return Coverage(
        adapter_tensors=tensors,
        applied=0 if refused else tensors - len(evidence.unexpected),
        modules_merged=len(evidence.targeted),
        parameters_checked=evidence.parameters_checked,
        layers_in_blocks=0 if evidence.differing else evidence.layers_in_blocks,
        layers_by_peft=evidence.layers_by_peft,
        layers_witnessed=len(evidence.cross_checked),
        layers_differing=evidence.differing[:10],
        layers_proved=evidence.forward.layers_compared - len(evidence.different),
        layers_not_proved=len(evidence.not_compared),
        reasons_not_proved=tuple(sorted({reason for _, reason in evidence.not_compared})),
        parameters_total=evidence.parameters_total,
    )
