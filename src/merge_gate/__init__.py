"""Merge LoRA and other PEFT adapters into a scratch copy of their base and prove every parameter finite."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from merge_gate._internal.errors import ConfigError, GateError, UsageError
    from merge_gate.api import export, gate, read_report
    from merge_gate.features.export.export_record import Export, ExportRecord  # type: ignore[import-not-found, unused-ignore]
    from merge_gate.records.report import AdapterReport, BaseReport, Report
    from merge_gate.records.terms import Finding, Result, Severity, Verdict

__version__ = "1.0.0.dev0"

__all__ = [
    "AdapterReport",
    "BaseReport",
    "ConfigError",
    "Export",
    "ExportRecord",
    "Finding",
    "GateError",
    "Report",
    "Result",
    "Severity",
    "UsageError",
    "Verdict",
    "__version__",
    "export",
    "gate",
    "read_report",
]

_MODULES = {
    "merge_gate.api": ("export", "gate", "read_report"),
    "merge_gate._internal.errors": ("ConfigError", "GateError", "UsageError"),
    "merge_gate.records.report": ("AdapterReport", "BaseReport", "Report"),
    "merge_gate.records.terms": ("Finding", "Result", "Severity", "Verdict"),
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: the command line and the action need none of them."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    if name in ("Export", "ExportRecord"):
        return getattr(import_module("merge_gate.records.features").part("export", "directory"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, whether they are imported already or not."""
    return sorted({*globals(), *__all__})
