"""What several checks share: parts of sentences, and which modules a change reaches.

In: numbers, lists, and names of modules. Out: text, and names. Knows no check.
"""

from __future__ import annotations

from collections.abc import Sized

from merge_gate._internal.text import counted, quoted
from merge_gate.records.files import Pattern
from merge_gate.records.measured import Evidence, TensorStats

RESTORE_CONFIG = "restore the adapter_config.json that was saved with the adapter"

NAMES = 3
"""Names of an adapter's tensors are long, and the first ones say what kind it is."""


def describe_nonfinite(stats: TensorStats) -> str:
    """`1 NaN and 2 -Inf among 16,384 values, the first at [0, 7]`."""
    kinds = ((stats.nan, "NaN"), (stats.posinf, "+Inf"), (stats.neginf, "-Inf"))
    *others, last = (f"{count:,} {kind}" for count, kind in kinds if count)
    counts = f"{', '.join(others)} and {last}" if others else last
    where = "" if nothing_finite(stats) or stats.first_index is None else f", the first at {list(stats.first_index)}"
    return f"{counts} among {counted(stats.numel, 'value')}{where}"


def nothing_finite(stats: TensorStats) -> bool:
    """Whether every value is NaN or infinite."""
    return stats.nan + stats.posinf + stats.neginf == stats.numel


def figure(value: float) -> str:
    """`65,504`, `0.25`, `3.4e+38`."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"  # noqa: PLR2004 - where zeros are counted


def above(items: Sized) -> str:
    """`; 3 tensors are above it`; of one nothing, for it has been named."""
    return f"; {tensors(items)} are above it" if len(items) > 1 else ""


def tensors(items: Sized) -> str:
    """`1 tensor`, `2 tensors`."""
    return counted(len(items), "tensor")


def are(items: Sized) -> str:
    """`are` or `is`, by the count."""
    return "are" if len(items) != 1 else "is"


def describe_pattern(pattern: Pattern) -> str:
    """`target_modules in adapter_config.json is "("`, cut to a readable length."""
    return f"{pattern.place} in adapter_config.json is {quoted(pattern.text, 200)}"


def named(module: str | None) -> str:
    """A module by its name, which the model itself does not have."""
    return module or "the model itself"


def with_sharers(evidence: Evidence, modules: set[str]) -> set[str]:
    """These modules, and the modules that share a tensor with them."""
    return modules | {other for other, first in evidence.shared if first in modules}


def is_inside(module: str, changed: set[str]) -> bool:
    return module in changed or any(inner.startswith(f"{module}.") for inner in changed) or not module
