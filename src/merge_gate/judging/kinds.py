"""The kinds of findings that are no checks: nothing configures them. Id, severity, sentence, and hint of each.

In: kinds.csv. Out: `WITHOUT_SETTING`, of a run, and `ANSWERS`, of `merge-gate verify`, in the order in which they
decide: the first kind that is found is the cause.
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
class FindingKind:
    """One kind.

    Attributes:
        id: its name in the report, for `--allow`, and for `merge-gate explain`.
        severity: that of its findings. An answer that is a note is good: the model is what it should be.
        phrase: what a headline says of the model: "the model …"; empty for a finding of a run.
        summary: when it is given.
        hint: what to do about it; empty for a good answer.
    """

    id: str
    severity: Severity
    phrase: str
    summary: str
    hint: str

    @property
    def is_good(self) -> bool:
        return self.severity is Severity.NOTE


NOT_PUBLISHED = "not-published"
STOP_TOKENS, TOKENIZER_SIZE = "stop-tokens", "tokenizer-size"
PUBLISHED_FILES, EARLIER_MODEL = "published-files", "earlier-model"
BROKEN_FILES, OTHER_ARCHITECTURE = "broken-files", "other-architecture"


def _rows(*, is_answer: bool) -> Iterator[tuple[str, FindingKind]]:
    with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as table:
        for row in csv.DictReader(table):
            fields: dict[str, Any] = row | {"severity": Severity(row["severity"])}
            if bool(row["phrase"]) is is_answer:
                yield row["id"], FindingKind(**fields)


WITHOUT_SETTING: Mapping[str, FindingKind] = MappingProxyType(dict(_rows(is_answer=False)))
ANSWERS: Mapping[str, FindingKind] = MappingProxyType(dict(_rows(is_answer=True)))

_NEVER_ALLOWED = {BROKEN_FILES, OTHER_ARCHITECTURE, "wrong-base"}
ALLOWED = tuple(row.id for row in ANSWERS.values() if not row.is_good and row.id not in _NEVER_ALLOWED)
"""The kinds that `--allow` accepts. No model is accepted whose tensors were not compared.

With another base, every value may differ, so nothing would be compared either."""


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
    row = ANSWERS.get(kind) or WITHOUT_SETTING[kind]
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
