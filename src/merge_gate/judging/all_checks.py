"""Evidence → findings: every check of the table over one adapter.

In: what was measured of an adapter, what its files say, and the settings of the checks. Out: `Finding`s, causes first.
Plain Python over numbers and names: no torch, no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from merge_gate.judging.checks import effect
from merge_gate.judging.checks.check import Case, limit
from merge_gate.judging.checks.table import CHECKS, NOT_JUDGED
from merge_gate.judging.limits import bounded
from merge_gate.records.config import AdapterSpec, CheckSetting
from merge_gate.records.files import AdapterFiles
from merge_gate.records.measured import Evidence, Leeway, Refusal
from merge_gate.records.terms import Finding, Origin, Severity

_WEIGHT = {Severity.ERROR: 0, Severity.WARNING: 1, Severity.NOTE: 2}

MEASURE_ABOVE = 0.5
"""Values that may be above this share of their dtype's largest are merged one by one, whatever `headroom` says."""


def leeway(spec: AdapterSpec, *, quick: bool = False) -> Leeway:
    """What need not be known exactly: an error rests on a measurement, a warning may rest on an estimate.

    With `quick`, a bound may stand for a merge, as long as it stays below the limit of `headroom`.
    """
    settings = {setting.check: setting for setting in spec.checks}
    errors = {setting.check for setting in spec.checks if setting.severity is Severity.ERROR}
    return Leeway(
        headroom=min(limit(settings, effect.headroom), MEASURE_ABOVE) if quick else 0.0,
        estimates=not {effect.rounding_loss.id, effect.delta_norm.id} & errors,
    )


def judge(spec: AdapterSpec, files: AdapterFiles, evidence: Evidence | None) -> tuple[Finding, ...]:
    """All findings about one adapter on one base, causes first, with the severities that the config asks for.

    `evidence` is None where the files alone decided and nothing was merged.
    """
    settings = MappingProxyType({setting.check: setting for setting in spec.checks})
    case = Case(spec=spec, files=files, evidence=evidence, settings=settings)
    found = list(files.findings)
    for check in CHECKS.values():
        try:
            found.extend(check.judge(case))
        except Exception as error:  # noqa: BLE001 - it costs this check's answer; the others stand
            found.append(accident(f"the check {check.id} failed", error))
    if evidence is not None and evidence.refusal is not None:
        found.append(refused(evidence.refusal))
    order = {name: position for position, name in enumerate((NOT_JUDGED, *CHECKS))}
    settled = [one for one in (_settle(finding, settings) for finding in found) if one is not None]
    return tuple(sorted(bounded(settled), key=lambda one: (_WEIGHT[one.severity], order.get(one.check, 0))))


def _settle(finding: Finding, settings: Mapping[str, CheckSetting]) -> Finding | None:
    """Apply the configured severity. A check's own warning stays one: it marks the lesser case. A note stays a note."""
    check, setting = CHECKS.get(finding.check), settings.get(finding.check)
    if check is None or setting is None or not check.can_be_off or finding.severity is Severity.NOTE:
        return finding
    if setting.severity is Severity.OFF:
        return None
    if setting.severity is Severity.ERROR and finding.severity is Severity.WARNING is not check.severity:
        return finding
    return replace(finding, severity=setting.severity)


def refused(refusal: Refusal) -> Finding:
    """What kept the engine from loading or merging, as the finding of its check."""
    if refusal.check is None:
        return undecided(refusal.message, refusal.hint, origin=refusal.origin)
    return CHECKS[refusal.check].finding(
        refusal.message, refusal.hint, refusal.origin, module=refusal.module, tensor=refusal.tensor
    )


def undecided(message: str, hint: str = "", *, origin: Origin = Origin.RUNTIME) -> Finding:
    """The finding of an adapter that could not be judged: neither passed nor failed."""
    return Finding(check=NOT_JUDGED, severity=Severity.ERROR, message=message, hint=hint, origin=origin)


def accident(what: str, error: Exception) -> Finding:
    """`undecided` by an exception that nobody expected."""
    if isinstance(error, MemoryError):
        return undecided(f"{what}: out of memory", "use a larger runner, or gate this adapter alone")
    return undecided(
        f"{what}: unexpected {type(error).__name__}: {str(error)[:200]}",
        "this is a bug of merge-gate: please report it, with the adapter's config if you can",
    )
