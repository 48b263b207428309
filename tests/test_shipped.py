"""Adapters as people ship them: those that PEFT merges pass with its bits, the others say what a person is to do."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from merge_gate.records.report import AdapterReport
from merge_gate.records.terms import Severity, Verdict
from tests.support import methods
from tests.support.cases import gated
from tests.support.engine.shipped import SHIPPED, Shipped, loftq, merge_plainly
from tests.support.gating import Gate, one_thread
from tests.support.merged import kept
from tests.support.models import Shelf

ROWS = (*SHIPPED, Shipped(name="loftq", make=loftq, cause="not-judged", says=("'loftq'",)))
if torch.cuda.is_available():
    ROWS = SHIPPED
PASSING = [row for row in SHIPPED if row.cause is None]


@pytest.fixture(scope="module")
def root(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shipped")
    with one_thread(), methods.quiet():  # what old trainers warn of is not in question
        for row in ROWS:
            row.make(shelf, directory / row.name)
    return directory


@pytest.fixture(scope="module")
def told(shelf: Shelf, root: Path) -> Mapping[str, AdapterReport]:
    """All rows in one run."""
    entries = []
    for row in ROWS:
        base = {"base": {"model": str(shelf.base(row.base))}} if row.base else {}
        entries.append({"name": row.name, "path": str(root / row.name / row.path)} | base)
    return {one.name: one for one in gated(root, entries, **{"allow-pickle": True}).adapters}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_it_is_judged_as_peft_loads_it_and_says_what_to_do(row: Shipped, told: Mapping[str, AdapterReport]) -> None:
    report = told[row.name]
    said = [f"{one.check}: {one.message}" for one in report.findings]
    expected = Verdict.PASSED if row.cause is None else Verdict.ERROR if row.cause == "not-judged" else Verdict.FAILED
    assert report.verdict is expected, said
    if row.cause is None:
        assert {one.check for one in report.findings if one.severity is Severity.WARNING} == set(row.warned), said
        return
    finding = next(one for one in report.findings if one.severity is Severity.ERROR)
    assert finding.check == row.cause, said
    for words, text in ((row.says, finding.message), (row.hint, finding.hint)):
        assert [word for word in words if word not in text] == [], text


@pytest.mark.slow
@pytest.mark.parametrize("row", PASSING, ids=lambda row: row.name)
def test_the_merge_is_what_plain_peft_makes_of_the_directory(row: Shipped, shelf: Shelf, root: Path) -> None:
    with one_thread(), methods.quiet(), kept() as seen:
        expected = merge_plainly(row, shelf, root / row.name)
        Gate().judge(root / row.name / row.path, shelf.base(str(row.base)), allow_pickle=True)
    assert all(torch.isfinite(tensor).all() for tensor in expected.values())
    assert seen
    assert methods.same({name: expected[name] for name in seen}, seen)
