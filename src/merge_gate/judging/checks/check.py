"""What a check is: a row of the table, and the function that judges.

In: nothing. Out: `Check`, `Case`, and the decorator `check`, which makes a row of a function. Plain Python over
numbers and names: no torch, no files. The rows stand in base_checks.py, file_checks.py, fit.py, finite.py and
effect.py; table.py puts them together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from enum import StrEnum

from merge_gate.records.config import AdapterSpec, CheckSetting
from merge_gate.records.files import AdapterFiles
from merge_gate.records.measured import Evidence, TensorStats
from merge_gate.records.terms import Finding, Origin, Severity, record

ERROR, WARNING = Severity.ERROR, Severity.WARNING


class Symptom(StrEnum):
    """What a person sees of it; the rows of the README's table, in its order."""

    NONFINITE = "NaN or Inf in the adapter, in its base, or only in the sum of the two"
    NO_EFFECT = "the merge changes nothing, or rounding takes it back"
    TENSORS_LOST = "tensors lost on saving or dropped on loading"
    BAD_BASE = "a base that is incomplete, contradicts itself, or has a format that cannot be judged"
    BAD_FILE = "a file that is missing, cut off, a Git LFS pointer, or a pickle"
    BAD_CONFIG = "a config that contradicts the weights, or would import code"
    WRONG_PAIR = "the wrong base, or the wrong adapter"
    UNTRAINED_MERGE = "a merge that is not what was trained"
    EXTREME_VALUES = "values close to the limit, deltas larger than the weight"


@record
class Check:
    """One row of the table of checks.

    Attributes:
        id: its name in configurations and reports.
        severity: what its finding weighs where the configuration says nothing.
        limit: the figure above which it fires by default; None: it has none.
        summary: one sentence, what it fires at.
        symptom: what a person sees of it.
        can_be_off: whether a configuration may switch it off or lower it to a warning.
        is_of_base: an error of it is not the adapter's fault: the verdict is `error`, not `failed`.
        allows_merging: an error of it, found before the merge, still lets the adapter be merged and judged further.
        allows_loading: the adapter may be loaded although its files have this finding, where the configuration makes
            it less than an error. False unless somebody has thought about it: PEFT must not see what is unsafe.
        judge: yields its findings; of a check whose findings come with the files or with a refusal, none.
    """

    id: str
    severity: Severity
    summary: str
    symptom: Symptom
    limit: float | None = None
    can_be_off: bool = True
    is_of_base: bool = False
    allows_merging: bool = False
    allows_loading: bool = False
    judge: Callable[[Case], Iterator[Finding]] = lambda _: iter(())

    def finding(
        self,
        message: str,
        hint: str,
        origin: Origin,
        *,
        severity: Severity | None = None,
        module: str | None = None,
        tensor: str | None = None,
        stats: TensorStats | None = None,
        measured: tuple[tuple[str, float], ...] = (),
    ) -> Finding:
        """A finding of this check.

        Args:
            message: what is wrong, where, got and expected.
            hint: what to do about it; may be empty.
            origin: where the cause lies.
            severity: marks a lesser case: a warning of a check that is an error.
            module: module of the base.
            tensor: name of the tensor.
            stats: instead of its name, where its counts of NaN and infinities belong into the report.
            measured: the figures behind the finding, by name.
        """
        found = Finding(
            check=self.id,
            severity=severity or self.severity,
            message=message,
            hint=hint,
            origin=origin,
            module=module,
            tensor=tensor,
            measured=measured,
        )
        if stats is None:
            return found
        return replace(
            found,
            tensor=stats.name,
            nan=stats.nan,
            posinf=stats.posinf,
            neginf=stats.neginf,
            numel=stats.numel,
            first_index=stats.first_index,
        )


def check(
    name: str,
    severity: Severity,
    summary: str,
    symptom: Symptom,
    *,
    limit: float | None = None,
    can_be_off: bool = True,
    is_of_base: bool = False,
    allows_merging: bool = False,
    allows_loading: bool = False,
) -> Callable[[Callable[[Case], Iterator[Finding]]], Check]:
    """Make a row of the table of the function that judges. The order of definition is the order of blame."""
    return lambda judge: Check(
        id=name,
        severity=severity,
        summary=summary,
        symptom=symptom,
        limit=limit,
        can_be_off=can_be_off,
        is_of_base=is_of_base,
        allows_merging=allows_merging,
        allows_loading=allows_loading,
        judge=judge,
    )


@record
class Case:
    """What a check looks at. `evidence` is None where nothing was merged."""

    spec: AdapterSpec
    files: AdapterFiles
    evidence: Evidence | None
    settings: Mapping[str, CheckSetting]

    def limit(self, of: Check) -> float:
        return limit(self.settings, of)


def limit(settings: Mapping[str, CheckSetting], of: Check) -> float:
    """The figure above which a check fires; infinite where it has none."""
    setting = settings.get(of.id)
    chosen = setting.limit if setting is not None and setting.limit is not None else of.limit
    return math.inf if chosen is None else chosen
