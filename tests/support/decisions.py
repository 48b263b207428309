"""What a report says decided an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from merge_gate.records.report import AdapterReport


def told(report: AdapterReport) -> str:
    """What the report says, for the message of a failing assertion."""
    findings = "\n".join(f"  {f.severity} {f.check} ({f.origin}, {f.tensor}): {f.message}" for f in report.findings)
    return f"{report.name}: {report.verdict}, cause {report.cause}\n{findings}"
