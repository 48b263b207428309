"""The table of checks, in the order of blame: what a setting may say of each, and what it is by default.

In: nothing. Out: `CHECK_DEFAULTS`. Knows neither configurations nor measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from merge_gate.records import Severity

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class CheckDefault:
    """One row of the table of checks. `limit` None: the check has no limit. `summary` is one sentence."""

    severity: Severity
    limit: float | None
    can_be_off: bool
    summary: str


def _row(severity: Severity, summary: str, *, limit: float | None = None, can_be_off: bool = True) -> CheckDefault:
    return CheckDefault(severity=severity, limit=limit, can_be_off=can_be_off, summary=summary)


_ERROR, _WARNING = Severity.ERROR, Severity.WARNING

CHECK_DEFAULTS: Mapping[str, CheckDefault] = MappingProxyType(
    {
        "file-missing": _row(_ERROR, "There is no adapter_config.json, or no weights file."),
        "file-lfs-pointer": _row(_ERROR, "A Git LFS pointer stands where the weights should be."),
        "file-corrupt": _row(_ERROR, "A file is empty, truncated, or not in the format that it claims."),
        "pickle-refused": _row(_ERROR, "There are only pickled weights (.bin), and allow-pickle is false."),
        "config-invalid": _row(_ERROR, "adapter_config.json is not valid, or contradicts the tensors."),
        "config-unsafe": _row(_ERROR, "adapter_config.json would make PEFT import code."),
        "keys-missing": _row(_ERROR, "Tensors that the adapter's configuration promises are not in its file."),
        "keys-unexpected": _row(_ERROR, "The adapter's file holds tensors that nothing in the merge uses."),
        "shape-mismatch": _row(_ERROR, "A tensor does not fit the base."),
        "targets-not-found": _row(_ERROR, "The adapter targets modules that the base does not have."),
        "not-mergeable": _row(_ERROR, "The method cannot be merged into weights, or its merge is known to be wrong."),
        "base-mismatch": _row(_WARNING, "adapter_config.json names another base or revision than the one used."),
        "expectation-failed": _row(_ERROR, "Something stated under expect is not so."),
        "base-nonfinite": _row(_ERROR, "The base itself holds NaN or Inf, before any merge.", can_be_off=False),
        "adapter-nonfinite": _row(_ERROR, "The adapter's own file holds NaN or Inf."),
        "merged-nonfinite": _row(
            _ERROR,
            "A parameter or persistent buffer of the merged model is NaN or Inf in its final dtype.",
            can_be_off=False,
        ),
        "no-effect": _row(_ERROR, "The merge changes nothing."),
        "rounding-loss": _row(
            _WARNING, "More than this share of the delta's norm is lost in the base's dtype.", limit=0.5
        ),
        "headroom": _row(
            _WARNING, "A merged value is above this share of the largest finite value of its dtype.", limit=0.5
        ),
        "delta-norm": _row(_WARNING, "‖ΔW‖/‖W‖ of a module is above this.", limit=10.0),
        "not-reproducible": _row(_WARNING, "The merge depends on a random seed."),
        "tied-weights": _row(_ERROR, "A tied tensor is merged on one side only."),
    }
)  # fmt: skip
"""Every check, its default severity and limit, and whether it may be switched off (or lowered to a warning)."""
