"""The kinds of findings that are no checks: nothing configures them. Id, severity, sentence, and hint of each.

In: kinds.csv, and those that features declare. Out: `WITHOUT_SETTING`, of a run, and `ANSWERS`, of `merge-gate verify`,
in the order in which they decide: the first kind that is found is the cause.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from merge_gate.records.features import declared
from merge_gate.records.terms import Finding, Origin, Severity, record


@record
class FindingKind:
    """One kind.

    Attributes:
        id: its name in the report, for `--allow`, and for `merge-gate explain`.
        severity: that of its findings. An answer that is a note is good: the model is what it should be.
        summary: when it is given.
        phrase: what a headline says of the model: "the model …"; empty for a finding of a run.
        hint: what to do about it; empty for a good answer.
        never_allowed: not empty if `--allow` does not accept it: the tensors were then not compared, or, with another
            base, every value may differ.
        page: the page of the guides that has its section.
    """

    id: str
    severity: Severity
    summary: str
    phrase: str = ""
    hint: str = ""
    never_allowed: str = ""
    page: str = "verify"

    @property
    def is_good(self) -> bool:
        return self.severity is Severity.NOTE


def _rows() -> Iterator[tuple[str, FindingKind]]:
    for table in (Path(__file__).with_suffix(".csv"), *declared("KINDS")):
        with table.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                fields: dict[str, Any] = row | {"severity": Severity(row["severity"])}
                yield row["id"], FindingKind(**fields)


_KINDS = dict(_rows())
WITHOUT_SETTING = MappingProxyType({kind: row for kind, row in _KINDS.items() if not row.phrase})
ANSWERS = MappingProxyType({kind: row for kind, row in _KINDS.items() if row.phrase})
ALLOWED = tuple(row.id for row in ANSWERS.values() if not row.is_good and not row.never_allowed)
"""The kinds that `--allow` accepts."""


def finding(
    kind: str,
    message: str,
    *,
    tensor: str | None = None,
    hint: str = "",
    origin: Origin = Origin.MODEL,
    **measured: float,
) -> Finding:
    """A finding of a kind, with the finite ones of these figures."""
    row = _KINDS[kind]
    return Finding(
        check=kind,
        severity=row.severity,
        message=message,
        hint=hint or row.hint,
        tensor=tensor,
        origin=origin,
        measured=tuple((name, float(figure)) for name, figure in measured.items() if math.isfinite(figure)),
    )


def note(kind: str, message: str) -> Finding:
    """A fact of a kind that needs no action."""
    return replace(finding(kind, message), severity=Severity.NOTE, hint="")
