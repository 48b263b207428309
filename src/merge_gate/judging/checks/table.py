"""The one table of checks, in the order of blame.

In: the rows of the modules below, which are in that order, and so are the checks in each. Out: `CHECKS`. The first
check that fires is the cause (a NaN of the base before one of the adapter before one that the merge made), so a new
check is written at its place among the others, and nowhere else. Knows no configuration and no measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from merge_gate.judging.checks import base_checks, effect, expectations, file_checks, finite, fit, not_mergeable
from merge_gate.judging.checks.check import Check
from merge_gate.judging.not_judged import NOT_JUDGED
from merge_gate.records.config import CheckSetting
from merge_gate.records.terms import Severity, record

NOT_PUBLISHED = "not-published"
STOP_TOKENS, TOKENIZER_SIZE = "stop-tokens", "tokenizer-size"
PUBLISHED_FILES, EARLIER_MODEL = "published-files", "earlier-model"


@record
class FindingKind:
    """A kind of finding that is not a check: nothing is measured for it, and it has no setting."""

    severity: Severity
    summary: str


WITHOUT_SETTING: Mapping[str, FindingKind] = MappingProxyType(
    {
        NOT_JUDGED: FindingKind(
            severity=Severity.ERROR, summary="The adapter could not be judged, so it is not cleared."
        ),
        NOT_PUBLISHED: FindingKind(
            severity=Severity.ERROR, summary="The adapter passed, and its merged model could not be published."
        ),
        STOP_TOKENS: FindingKind(
            severity=Severity.WARNING, summary="The files of a published model name different stop tokens."
        ),
        TOKENIZER_SIZE: FindingKind(
            severity=Severity.WARNING,
            summary="The tokenizer of a published model has an id that the embedding has no row for.",
        ),
        PUBLISHED_FILES: FindingKind(
            severity=Severity.NOTE, summary="Some files of the base or the adapter were not published."
        ),
        EARLIER_MODEL: FindingKind(
            severity=Severity.WARNING, summary="The model of an earlier run has the name of one that was not published."
        ),
    }
)
"""The findings without a setting, by their id."""

CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        row.id: row
        for module in (base_checks, file_checks, fit, not_mergeable, expectations, finite, effect)
        for row in vars(module).values()
        if isinstance(row, Check)
    }
)
"""Every check by its id."""

DEFAULT_SETTINGS = tuple(CheckSetting(check=row.id, severity=row.severity, limit=row.limit) for row in CHECKS.values())
"""The setting of every check that no configuration changes."""
