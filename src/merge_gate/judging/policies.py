"""The policies: presets of strictness, in one table. The key of a check overrides its policy."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from merge_gate.judging.checks.table import CHECKS
from merge_gate.records.config import CheckSetting
from merge_gate.records.terms import Severity, record


@record
class Policy:
    """What one policy sets.

    Attributes:
        errors: the checks that are errors, whatever the table of checks says.
        of_base: the severity of warnings with the origin `base`; None leaves them as they are.
        needs_pins: whether adapters and bases on the Hub need a full commit.
        needs_known_variables: whether an unknown variable `MERGE_GATE_…` is an error, and not a warning.
    """

    errors: frozenset[str] = frozenset()
    of_base: Severity | None = None
    needs_pins: bool = False
    needs_known_variables: bool = False

    def setting(self, check: str) -> CheckSetting:
        """The setting of a check if the configuration has none."""
        row = CHECKS[check]
        severity = Severity.ERROR if check in self.errors else row.severity
        return CheckSetting(check=check, severity=severity, limit=row.limit, of_base=self.of_base)


DEFAULT = "default"
POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        DEFAULT: Policy(),
        "release": Policy(
            errors=frozenset(
                ("rounding-loss", "base-mismatch", "untrained-tensors", "not-reproducible", "meaning-changed")
            ),
            of_base=Severity.ERROR,
            needs_pins=True,
            needs_known_variables=True,
        ),
    }
)
"""Every policy by its name."""
