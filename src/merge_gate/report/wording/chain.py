"""Makes the chain of causes of an adapter: its `Stage`s from base to final dtype, and how each went."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING

from merge_gate.records.terms import Origin, Severity, record
from merge_gate.report.wording import words
from merge_gate.report.wording.grid import State, count_states
from merge_gate.report.wording.untrusted import one_line

if TYPE_CHECKING:
    from merge_gate.records.report import AdapterReport
    from merge_gate.records.terms import Finding


class Outcome(StrEnum):
    """How a stage went. A stage that breaks after another broken stage only follows from it."""

    SOUND = "sound"
    WARNED = "warned"
    BROKEN = "broken"
    FOLLOWS = "follows"
    UNKNOWN = "unknown"


@record
class Stage:
    """One link of the chain. `summary` has a few words."""

    name: str
    outcome: Outcome
    summary: str


_STAGES = {
    "base": frozenset({Origin.BASE}),
    "adapter": frozenset({Origin.FILE, Origin.CONFIG, Origin.ADAPTER}),
    "merge": frozenset({Origin.MERGE}),
}


def chain(adapter: AdapterReport) -> tuple[Stage, ...]:
    """Return the stages: base → adapter → merge → dtype, and → model if a finished model was compared."""
    merged = bool(adapter.coverage.modules_merged)
    sound = {
        "base": "finite" if merged else "",
        "adapter": words.counted(adapter.coverage.adapter_tensors, "tensor")
        if adapter.coverage.adapter_tensors
        else "",
        "merge": words.counted(adapter.coverage.modules_merged, "module") if merged else "",
    }
    stages = [*(_stage(name, adapter, sound[name]) for name in _STAGES), _dtype(adapter), *_model(adapter)]
    broken = [number for number, stage in enumerate(stages) if stage.outcome is Outcome.BROKEN]
    behind = broken[0] + 1 if broken else len(stages)
    return (*stages[:behind], *map(_behind_broken, stages[behind:]))


def _behind_broken(stage: Stage) -> Stage:
    """A stage behind the first broken one. An adapter can be sound on a broken base; a merge with it cannot."""
    if stage.outcome is Outcome.BROKEN:
        return replace(stage, outcome=Outcome.FOLLOWS)
    is_sound = stage.outcome is Outcome.SOUND and stage.name != "adapter"
    return replace(stage, outcome=Outcome.UNKNOWN) if is_sound else stage


def _stage(name: str, adapter: AdapterReport, sound: str) -> Stage:
    findings = [
        finding
        for finding in adapter.findings
        if finding.origin in _STAGES[name] and finding.severity is not Severity.NOTE
    ]
    errors = [finding for finding in findings if finding.severity is Severity.ERROR]
    if errors:
        return Stage(name=name, outcome=Outcome.BROKEN, summary=_checks(errors))
    if findings:
        return Stage(name=name, outcome=Outcome.WARNED, summary=_checks(findings))
    return Stage(name=name, outcome=Outcome.SOUND if sound else Outcome.UNKNOWN, summary=sound or "not judged")


def _dtype(adapter: AdapterReport) -> Stage:
    name = words.precision(adapter.base)
    counts = count_states(adapter.tensors)
    if not counts:
        return Stage(name=name, outcome=Outcome.UNKNOWN, summary="nothing was merged")
    broken = [f"{state} in {number}" for state, number in counts if state in {State.NAN, State.INF}]
    total = words.counted(len(adapter.tensors), "tensor")
    if broken:
        return Stage(name=name, outcome=Outcome.BROKEN, summary=f"{', '.join(broken)} of {total}")
    return Stage(name=name, outcome=Outcome.SOUND, summary=f"{total} merged, all finite")


def _model(adapter: AdapterReport) -> list[Stage]:
    """The model that was compared with the merge."""
    findings = [finding for finding in adapter.findings if finding.origin is Origin.MODEL]
    errors = [finding for finding in findings if finding.severity is Severity.ERROR]
    if not findings:
        return []
    outcome = Outcome.BROKEN if errors else Outcome.SOUND
    return [Stage(name="model", outcome=outcome, summary=_checks(errors or findings))]


def _checks(findings: list[Finding]) -> str:
    return ", ".join(dict.fromkeys(one_line(finding.check, words.NAME_LIMIT) for finding in findings))
