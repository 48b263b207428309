"""The kinds of answers of `merge-gate verify`: id, sentence, and hint of each.

In: answer_kinds.csv. Out: `ANSWERS`, in the order in which they decide: the first kind that is found is the cause.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from merge_gate.records.terms import Finding, Origin, Severity, record


@record
class AnswerKind:
    """One answer.

    Attributes:
        id: its name in the report, for `--allow`, and for `merge-gate explain`.
        phrase: what a headline says of the model: "the model …".
        summary: when this answer is given.
        hint: what to do about it; empty for a good answer.
        is_good: whether the model is what it should be.
    """

    id: str
    phrase: str
    summary: str
    hint: str
    is_good: bool


ATTESTATION, ATTESTED = "attestation", "attested"
BROKEN_FILES, OTHER_ARCHITECTURE = "broken-files", "other-architecture"


def _rows() -> Iterator[tuple[str, AnswerKind]]:
    with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as table:
        for row in csv.DictReader(table):
            fields: dict[str, Any] = row | {"is_good": bool(row["is_good"])}
            yield row["id"], AnswerKind(**fields)


ANSWERS: Mapping[str, AnswerKind] = MappingProxyType(dict(_rows()))
"""Every kind by its id."""

_NEVER_ALLOWED = {ATTESTATION, BROKEN_FILES, OTHER_ARCHITECTURE, "wrong-base"}
ALLOWED = tuple(row.id for row in ANSWERS.values() if not row.is_good and row.id not in _NEVER_ALLOWED)
"""The kinds that `--allow` accepts. A bad attestation is not accepted, and no model whose tensors were not compared.

With another base, every value may differ, so nothing would be compared either."""


def finding(kind: str, message: str, *, tensor: str | None = None, hint: str = "", **measured: float) -> Finding:
    """A finding of a kind, with the finite ones of these figures. A good kind is a note, any other one an error."""
    row = ANSWERS[kind]
    return Finding(
        check=kind,
        severity=Severity.NOTE if row.is_good else Severity.ERROR,
        message=message,
        hint=hint or row.hint,
        tensor=tensor,
        origin=Origin.MODEL,
        measured=tuple((name, float(figure)) for name, figure in measured.items() if math.isfinite(figure)),
    )


def note(kind: str, message: str) -> Finding:
    """A fact of a kind that needs no action."""
    return replace(finding(kind, message), severity=Severity.NOTE, hint="")
