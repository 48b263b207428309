"""Merges that other exporters made of a base and an adapter; exports/exports.json has their versions and dates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from merge_gate.records.terms import Severity, Verdict
from tests.support.gating import one_thread
from tests.support.verify.verification import Verifier

EXPORTS = Path(__file__).parent / "exports"


@pytest.mark.parametrize(
    ("exporter", "kind"),
    [
        pytest.param("mergekit", "other-order", marks=pytest.mark.attempt("V00", "a merge by mergekit", "other-order")),
        pytest.param("mlx", "exact", marks=pytest.mark.attempt("V01", "a merge by mlx-lm", "exact")),
    ],
)
def test_a_merge_by_another_exporter_is_named(exporter: str, kind: str) -> None:
    with one_thread():
        report = Verifier().report(EXPORTS / exporter, EXPORTS / "base", EXPORTS / "adapter")
    told = "\n".join(f"{one.severity} {one.check}: {one.message}" for one in report.findings)
    assert report.verdict is Verdict.PASSED, told
    assert [one.check for one in report.findings if one.severity is Severity.NOTE] == [kind], told


def test_each_export_says_how_it_was_made() -> None:
    notes = json.loads((EXPORTS / "exports.json").read_text())
    assert notes.keys() == {"inputs", "mergekit", "mlx"}
    assert all(note["date"] and note["versions"] for note in notes.values())
