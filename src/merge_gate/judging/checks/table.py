"""The one table of checks, in the order of blame.

In: the modules of this folder; one that has the name of a check is that check. Out: `CHECKS`, and what makes the
findings of refusals. The first check that fires is the cause: a NaN of the base before one of the adapter before one
that the merge made. Knows no configuration and no measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType

from merge_gate.judging import checks as own_checks
from merge_gate.judging.checks.check import Check
from merge_gate.records.terms import Finding

_MODULES = [
    vars(import_module(f"{own_checks.__name__}.{path.stem}"))
    for path in sorted(Path(own_checks.__path__[0]).glob("*.py"))
    if path.stem not in {"__init__", "check", "phrases", "table"}
]
_ROWS = [row for module in _MODULES for row in module.values() if isinstance(row, Check)]

CHECKS: Mapping[str, Check] = MappingProxyType({row.id: row for row in sorted(_ROWS, key=lambda row: row.blame)})
"""Every check by its id."""

REFUSALS: tuple[Callable[..., Finding], ...] = tuple(
    words for module in _MODULES for words in module.get("REFUSALS", ())
)
"""What makes the finding of each kind of refusal that is a check's own, from its fields."""
