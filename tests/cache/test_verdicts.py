"""A verdict that was kept says what it said, and says it of the same entry only."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from merge_gate.cache import verdicts
from merge_gate.cache.seal import Seal
from merge_gate.cache.verdicts import Line, Reached, can_be_kept, is_sealed, restored, sealed, today
from merge_gate.records.files import Entry
from merge_gate.records.report import Coverage
from merge_gate.records.terms import Verdict
from merge_gate.report.formats.fields import dump
from tests.support.cache.lines import entry, line, material_of, other

REACHED = Reached(at="2026-03-01T12:00:00Z", place="acme/adapters run 7", seconds=0.84)
SEAL = Seal("s" * 32)
MARK = "0" * 64
"""The seal that a document is found with."""


def found(document: Any, marked: Line, one: Entry) -> Line:
    """The line of a document that has the seal it was given."""
    assert marked.adapter.judged is not None
    back = restored(document, marked.adapter.judged.seal, material_of(one), one)
    assert back is not None
    return back


@pytest.mark.parametrize("verdict", [Verdict.PASSED, Verdict.FAILED])
def test_the_line_comes_back_with_its_marks(tmp_path: Path, verdict: Verdict) -> None:
    one = entry(tmp_path)
    judged = line(one, verdict)
    marked, document = sealed(judged, material_of(one), REACHED, SEAL)
    back = found(document, marked, one)
    assert back.adapter.cached
    assert back.adapter.judged == marked.adapter.judged
    assert back.adapter.judged is not None
    assert (back.adapter.judged.at, back.adapter.judged.place) == (REACHED.at, REACHED.place)
    plain = replace(back.adapter, cached=False, judged=None, seconds=judged.adapter.seconds)
    assert dump(plain) == dump(judged.adapter)
    assert back.base == replace(judged.base, sha256=None)


def test_names_and_places_in_the_file_are_of_today(tmp_path: Path) -> None:
    one = entry(tmp_path)
    _, document = sealed(line(one), material_of(one), REACHED, SEAL)
    moved = other(one, name="two", source="./two", line=9, column=1)
    back = restored(document, MARK, material_of(moved), moved)
    assert back is not None
    assert (back.adapter.name, back.adapter.source, back.adapter.line, back.adapter.column) == ("two", "./two", 9, 1)


def test_what_could_not_be_judged_is_not_kept(tmp_path: Path) -> None:
    judged = line(entry(tmp_path))
    assert can_be_kept(judged.adapter)
    assert not can_be_kept(replace(judged.adapter, verdict=Verdict.ERROR))


def forged(document: Any, place: tuple[str | int, ...], value: object) -> Any:
    """The document with another value, as whoever has no secret to fear could write it."""
    edited = copy.deepcopy(document)
    inner = edited
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    return edited


FORGERIES: dict[str, tuple[tuple[str | int, ...], object]] = {
    "passed in the place of failed": (("adapter", "verdict"), "passed"),
    "no finding": (("adapter", "findings"), []),
    "another cause": (("adapter", "cause"), "no-effect"),
    "a verdict that could not be reached": (("adapter", "verdict"), "error"),
    "a word that is none": (("adapter", "verdict"), "PASSED"),
    "a number for a word": (("adapter", "verdict"), 1),
    "no adapter": (("adapter",), None),
    "no base": (("base",), None),
    "another base": (("base", "model"), "./other"),
    "another dtype": (("adapter", "base", "dtype"), "float32"),
    "other files": (("adapter", "files", 0, "sha256"), "e" * 64),
    "other material": (("material", "device"), "cuda"),
    "a key that nobody knows": (("more",), 1),
    "a time that is none": (("at",), "yesterday"),
    "a place that is none": (("place",), 3),
    "a place without end": (("place",), "x" * 1000),
    "a number beyond all arithmetic": (("adapter", "seconds"), 10**400),
    "a count beyond all printing": (("base", "parameters"), 10**4000),
    "a time that nobody waits": (("seconds",), -1.0),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_document_that_contradicts_itself_is_a_miss(tmp_path: Path, what: str) -> None:
    """Whoever can write to the cache and knows the secret is stopped by this in what is impossible, no further."""
    one = entry(tmp_path)
    _, document = sealed(line(one, Verdict.FAILED), material_of(one), REACHED, SEAL)
    assert restored(document, MARK, material_of(one), one) is not None
    assert restored(forged(document, *FORGERIES[what]), MARK, material_of(one), one) is None


@pytest.mark.parametrize("document", [None, [], "passed", 1, {}, {"material": {}}])
def test_what_is_no_document_is_a_miss(tmp_path: Path, document: object) -> None:
    one = entry(tmp_path)
    assert restored(document, MARK, material_of(one), one) is None


def test_a_pass_without_coverage_is_a_miss(tmp_path: Path) -> None:
    one = entry(tmp_path)
    judged = line(one)
    hollow = replace(judged, adapter=replace(judged.adapter, coverage=Coverage(parameters_total=9)))
    _, document = sealed(hollow, material_of(one), REACHED, SEAL)
    assert restored(document, MARK, material_of(one), one) is None


def test_the_document_of_another_adapter_is_a_miss(tmp_path: Path) -> None:
    one, two = entry(tmp_path / "1"), entry(tmp_path / "2", data=b"others")
    _, document = sealed(line(one), material_of(one), REACHED, SEAL)
    assert restored(document, MARK, material_of(two), two) is None


def test_a_line_of_a_report_is_known_by_its_seal(tmp_path: Path) -> None:
    one = entry(tmp_path)
    marked, _ = sealed(line(one, Verdict.FAILED), material_of(one), REACHED, SEAL)
    assert is_sealed(marked, material_of(one), SEAL)
    assert today(marked, one) is not None
    edited = replace(marked, adapter=replace(marked.adapter, verdict=Verdict.PASSED, cause=None, findings=()))
    assert not is_sealed(edited, material_of(one), SEAL)
    assert not is_sealed(marked, material_of(one), Seal()), "a seal without the secret passed for one with it"
    assert not is_sealed(replace(marked, base=replace(marked.base, parameters=1)), material_of(one), SEAL)
    assert not is_sealed(line(one), material_of(one), SEAL)


def test_a_line_that_comes_back_has_the_same_seal(tmp_path: Path) -> None:
    one = entry(tmp_path)
    marked, document = sealed(line(one), material_of(one), REACHED, SEAL)
    back = found(document, marked, one)
    assert is_sealed(back, material_of(one), SEAL), "a run that is resumed twice would lose it"
    assert marked.adapter.judged == back.adapter.judged
    assert verdicts.KIND == "verdicts"
