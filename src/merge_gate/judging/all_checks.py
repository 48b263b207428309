"""Every check of the table over one adapter: before its merge (`judge_files`) and after it (`judge_merge`).

In: an adapter's files, its `Evidence`, and the settings of the checks. Out: `Finding`s, causes first. Imports no torch
and opens no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from merge_gate.judging import not_judged, peft_errors
from merge_gate.judging.bounds import bounded
from merge_gate.judging.checks import table
from merge_gate.judging.checks.check import Check, FileCase, MergeCase
from merge_gate.judging.checks.delta_norm import delta_norm
from merge_gate.judging.checks.rounding_loss import allowed_norm, rounding_loss
from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.not_judged import NOT_JUDGED, accident
from merge_gate.records.config import AdapterSpec, CheckSetting
from merge_gate.records.files import AdapterFiles
from merge_gate.records.measured import Evidence, MeasureOptions
from merge_gate.records.refusals import NotJudged, Refusal
from merge_gate.records.terms import Finding, ForwardMode, Origin, Severity

WEIGHT = {Severity.ERROR: 0, Severity.WARNING: 1, Severity.NOTE: 2}

REFUSALS: Mapping[str, Callable[..., Finding]] = MappingProxyType(
    {words.__name__: words for words in (*not_judged.REFUSALS, *table.REFUSALS, *peft_errors.REFUSALS)}
)
"""What makes the finding of each kind of refusal, from its fields."""

ESTIMATED_BELOW = 0.25
"""A ratio of norms above this share of the error limit is measured, because an error must not rest on an estimate."""


def measure_options(spec: AdapterSpec) -> MeasureOptions:
    """What may be estimated: a warning may rest on an estimate, an error rests on a measurement."""
    settings = {setting.check: setting for setting in spec.checks}
    errors = {setting.check for setting in spec.checks if setting.severity is Severity.ERROR}
    return MeasureOptions(
        estimates=not {rounding_loss.id, delta_norm.id} & errors,
        estimated_ratio=delta_norm.limits(settings)[1] * ESTIMATED_BELOW,
        norm_limit=allowed_norm(settings),
        error_limit=rounding_loss.limits(settings)[1],
        rows=spec.forward is ForwardMode.AUTO,
    )


def judge_files(spec: AdapterSpec, files: AdapterFiles) -> tuple[Finding, ...]:
    """All findings about an adapter's files, causes first, with the configured severities."""
    case = FileCase(spec=spec, files=files)
    return _in_order((*files.findings, *bounded(_yielded(lambda check: check.of_files(case)))), _settings(spec))


def judge_merge(spec: AdapterSpec, files: AdapterFiles, evidence: Evidence) -> tuple[Finding, ...]:
    """All findings about a merged adapter and its files, causes first, with the configured severities."""
    case = MergeCase(spec=spec, files=files, evidence=evidence, settings=_settings(spec))
    findings = _yielded(lambda check: check.of_merge(case))
    if evidence.refusal is not None:
        findings.append(refused(evidence.refusal))
    return _in_order((*files.findings, *bounded(findings)), case.settings)


def _settings(spec: AdapterSpec) -> Mapping[str, CheckSetting]:
    return MappingProxyType({setting.check: setting for setting in spec.checks})


def _yielded(judge: Callable[[Check], Iterator[Finding]]) -> list[Finding]:
    findings: list[Finding] = []
    for check in CHECKS.values():
        try:
            findings.extend(judge(check))
        except Exception as error:  # noqa: BLE001 - this check has no answer; the others still have theirs
            findings.append(accident(f"the check {check.id} failed", error))
    return findings


def _in_order(findings: Iterable[Finding], settings: Mapping[str, CheckSetting]) -> tuple[Finding, ...]:
    with_settings = (_configured(each, settings) for each in findings)
    configured = [_of_base(each, settings) for each in with_settings if each is not None]
    order = {name: position for position, name in enumerate((NOT_JUDGED, *CHECKS))}
    return tuple(sorted(configured, key=lambda finding: (WEIGHT[finding.severity], order.get(finding.check, 0))))


def _configured(finding: Finding, settings: Mapping[str, CheckSetting]) -> Finding | None:
    """Apply the configured severity.

    A warning from a check itself stays a warning: it is the less serious case. A note stays a note, unless all findings
    of its check are notes. A warning above its error limit stays an error.
    """
    check, setting = CHECKS.get(finding.check), settings.get(finding.check)
    if check is None or setting is None or not check.can_be_off:
        return finding
    if finding.severity is Severity.NOTE is not check.severity:
        return finding
    if setting.severity is Severity.OFF:
        return None
    if check.error_limit is not None and finding.severity is Severity.ERROR:
        return finding
    is_lesser = finding.is_lesser or finding.severity is not check.severity
    if setting.severity is Severity.ERROR and finding.severity is Severity.WARNING and is_lesser:
        return finding
    return replace(finding, severity=setting.severity)


def _of_base(finding: Finding, settings: Mapping[str, CheckSetting]) -> Finding:
    """Apply the policy to a warning about the base."""
    setting = settings.get(finding.check)
    is_warning = finding.severity is Severity.WARNING and finding.origin is Origin.BASE
    if not is_warning or setting is None or setting.of_base is None:
        return finding
    return replace(finding, severity=setting.of_base)


def refused(refusal: Refusal | NotJudged) -> Finding:
    """The finding that says why an adapter was not loaded, merged, or judged."""
    try:
        if isinstance(refusal, NotJudged):
            finding = not_judged.not_judged(refusal.message, refusal.hint, origin=refusal.origin, log=refusal.log)
        else:
            finding = REFUSALS[refusal.kind](**refusal.fields)
        return bounded([finding])[0]
    except Exception as error:  # noqa: BLE001 - a fact holds text of the adapter, and costs no other adapter its verdict
        return accident("the reason why it was not merged cannot be worded", error)
