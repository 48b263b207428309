"""The address of the page on a check, or on an answer of `merge-gate verify`, once the project has an address.

In: an id, or a report on an adapter or a base. Out: an address, or the report whose findings have theirs. All reports
of a run pass here, so no module that makes a finding knows of addresses.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from merge_gate import __version__
from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.kinds import ANSWERS, WITHOUT_SETTING
from merge_gate.records.project import check_url, kind_url
from merge_gate.records.report import AdapterReport, BaseReport

WITH_PAGE = CHECKS.keys() | WITHOUT_SETTING.keys()
"""The ids that have a page of their own in docs/checks."""

EXPLAINED = WITH_PAGE | ANSWERS.keys()
"""The ids that `merge-gate explain` knows."""

_Judged = TypeVar("_Judged", AdapterReport, BaseReport)


def page_of(check: str) -> str | None:
    """The address of the page on a check or an answer. None if it has none, or while the project has no address."""
    if check in WITH_PAGE:
        return check_url(check, __version__)
    return kind_url(check, __version__) if check in ANSWERS else None


def linked(report: _Judged) -> _Judged:
    """The report with the address of each finding's check."""
    findings = tuple(
        finding if finding.url == (url := page_of(finding.check)) else replace(finding, url=url)
        for finding in report.findings
    )
    return report if findings == report.findings else replace(report, findings=findings)
