"""500 adapters, and 500 that are all broken in many ways: each format stays within its reader's limits."""

from __future__ import annotations

import dataclasses
import gzip
import json
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest

from merge_gate.judging.checks.table import CHECKS
from merge_gate.records.terms import Verdict
from merge_gate.report.stored.report_files import FORMATS
from tests.support.large_report import fleet, merged
from tests.support.reports import NAN, adapter, report

if TYPE_CHECKING:
    from merge_gate.records.report import Report

MIB = 1024 * 1024
SUMMARY_BYTES = 1 * MIB  # GitHub drops a longer one
SARIF_RESULTS = 5_000  # GitHub keeps no more of a run
SARIF_GZIP_BYTES = 10 * 1000 * 1000  # nor does it take a larger file, as uploaded
JUNIT_BYTES = 30 * 1000 * 1000  # GitLab's, for one file
JUNIT_NODE_BYTES = 10 * 1000 * 1000  # libxml2's, for one text, which GitLab's parser does not lift
HTML_BYTES = 10 * 1000 * 1000  # ours: what a browser opens at once


def all_broken() -> Report:
    """Each adapter with a dozen kinds of finding."""
    found = tuple(dataclasses.replace(NAN, check=check) for check in list(CHECKS)[:12])
    common = {"cause": found[0].check, "findings": found, "tensors": merged(nan="5.self_attn.q_proj")}
    return report(*(adapter(f"team-{n:03d}", Verdict.FAILED, **common) for n in range(500)))


@pytest.fixture(scope="module", params=["mixed", "all broken"])
def run(request: pytest.FixtureRequest) -> dict[str, str]:
    """Every format of a large run."""
    large = fleet(500) if request.param == "mixed" else all_broken()
    assert len(large.adapters) == 500
    return {name: render(large) for name, render in FORMATS.items() if name != "report.json"}


def test_the_summary_is_not_dropped(run: dict[str, str]) -> None:
    assert len(run["summary.md"].encode()) < SUMMARY_BYTES


def test_code_scanning_takes_all_of_it(run: dict[str, str]) -> None:
    assert len(json.loads(run["report.sarif"])["runs"][0]["results"]) <= SARIF_RESULTS
    assert len(gzip.compress(run["report.sarif"].encode())) < SARIF_GZIP_BYTES


def test_gitlab_parses_all_cases(run: dict[str, str]) -> None:
    assert len(run["junit.xml"].encode()) < JUNIT_BYTES
    root = ET.fromstring(run["junit.xml"])
    assert max(len(text) for text in root.itertext()) < JUNIT_NODE_BYTES
    cases = [(case.get("classname"), case.get("name")) for case in root.iter("testcase")]
    assert len(set(cases)) == 500, "GitLab ignores the second case of a name"


def test_a_browser_opens_the_page(run: dict[str, str]) -> None:
    assert len(run["report.html"].encode()) < HTML_BYTES
