"""A stored verdict comes back as it was, and only for the entry that it is about."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from merge_gate.features.cache.cached_verdict import CachedVerdict, document_of, for_entry, from_document
from merge_gate.judging.not_judged import not_judged
from merge_gate.records.files import Entry
from merge_gate.records.report import Coverage, Judged
from merge_gate.records.terms import Verdict
from merge_gate.report.formats.fields import dump
from merge_gate.run.verdict_key import key_of
from tests.support.cache.verdicts import judged, material_of, other
from tests.support.judged_entry import entry

PLACE = "acme/adapters run 7"


def stored(verdict: CachedVerdict, one: Entry) -> tuple[CachedVerdict, Any]:
    """The verdict with its time and place, and its document."""
    reached = Judged(key=key_of(material_of(one)), at="2026-03-01T12:00:00Z", place=PLACE, seconds=0.84)
    found = replace(verdict, adapter=replace(verdict.adapter, judged=reached))
    return found, document_of(found, material_of(one))


def restored(document: Any, one: Entry) -> CachedVerdict | None:
    """What comes of a document."""
    found = from_document(document, material_of(one))
    return for_entry(found, one) if found is not None else None


@pytest.mark.parametrize("verdict", [Verdict.PASSED, Verdict.FAILED])
def test_a_verdict_comes_back_with_its_time_and_place(tmp_path: Path, verdict: Verdict) -> None:
    one = entry(tmp_path)
    fresh = judged(one, verdict)
    before, document = stored(fresh, one)
    back = restored(document, one)
    assert back.adapter.cached
    assert back.adapter.judged == before.adapter.judged
    assert (back.adapter.judged.place, back.adapter.judged.seconds) == (PLACE, fresh.adapter.seconds)
    plain = replace(back.adapter, cached=False, judged=None, seconds=fresh.adapter.seconds)
    assert dump(plain) == dump(fresh.adapter)
    assert back.base == replace(fresh.base, sha256=None)


def test_names_and_places_in_the_config_are_those_of_today(tmp_path: Path) -> None:
    one = entry(tmp_path)
    _, document = stored(judged(one), one)
    back = restored(document, other(one, name="two", source="./two", line=9, column=1))
    assert (back.adapter.name, back.adapter.source, back.adapter.line, back.adapter.column) == ("two", "./two", 9, 1)


DIED = not_judged("the worker died", "run it again")


@pytest.mark.parametrize(
    "fields",
    [{"verdict": Verdict.ERROR, "cause": DIED.check, "findings": (DIED,)}, {"coverage": Coverage(parameters_total=9)}],
    ids=["an error, which says nothing about another run", "a pass without coverage"],
)
def test_a_sealed_verdict_that_does_not_count_is_a_miss(fields: dict[str, Any], tmp_path: Path) -> None:
    one = entry(tmp_path)
    verdict = judged(one)
    _, document = stored(replace(verdict, adapter=replace(verdict.adapter, **fields)), one)
    assert restored(document, one) is None


def forged(document: Any, place: tuple[str | int, ...], value: object) -> Any:
    """The document with another value, as anyone who knows the secret could write it."""
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
    "an unknown key": (("more",), 1),
    "a time that is none": (("at",), "yesterday"),
    "a place that is none": (("place",), 3),
    "a place without end": (("place",), "x" * 1000),
    "a number beyond all arithmetic": (("adapter", "seconds"), 10**400),
    "a count beyond all printing": (("base", "parameters"), 10**4000),
    "a negative time": (("seconds",), -1.0),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_document_that_contradicts_itself_is_a_miss(tmp_path: Path, what: str) -> None:
    """This stops what is impossible, and no more, if someone can write to the cache and knows the secret."""
    one = entry(tmp_path)
    _, document = stored(judged(one, Verdict.FAILED), one)
    assert restored(document, one) is not None
    assert restored(forged(document, *FORGERIES[what]), one) is None


@pytest.mark.parametrize("document", [None, [], "passed", 1, {}, {"material": {}}])
def test_another_document_is_a_miss(tmp_path: Path, document: object) -> None:
    assert restored(document, entry(tmp_path)) is None


def test_the_document_of_another_adapter_is_a_miss(tmp_path: Path) -> None:
    one, two = entry(tmp_path / "1"), entry(tmp_path / "2", data=b"others")
    found, document = stored(judged(one), one)
    assert restored(document, two) is None
    assert for_entry(found, one) is not None
    assert for_entry(found, two) is None
    assert for_entry(found, replace(one, base=None)) is None


def test_a_line_without_a_time_and_place_is_a_miss(tmp_path: Path) -> None:
    one = entry(tmp_path)
    assert for_entry(judged(one), one) is None
