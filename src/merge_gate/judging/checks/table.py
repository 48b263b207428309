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
from merge_gate.records.config import CheckSetting

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
