"""A verdict as it is kept, and back: what is read must be what this run would have said of the same entry.

In: a line of the report with its base, and the material of its key. Out: a document to be sealed. Back: the document,
today's entry and today's material; out comes the line of today's report, or None. What only names an entry (name,
source, place in the file) is today's; so are the files, which must be the same.

1. Kept is what was judged: `passed` or `failed`. `error` is of its run.
2. Read back, the verdict must follow from the findings and the coverage, by the same rules as when it was reached.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from merge_gate.cache.key import canonical, key_of
from merge_gate.judging import verdict
from merge_gate.records.report import AdapterReport, BaseReport, Judged
from merge_gate.records.terms import Verdict, record
from merge_gate.report.formats.fields import UnreadableError, dump, load

if TYPE_CHECKING:
    from merge_gate.cache.seal import Seal
    from merge_gate.records.files import Entry

Json = Any

KIND = "verdicts"
_KEYS = {"material", "at", "place", "seconds", "adapter", "base"}
LONGEST_PLACE = 200
_AT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


@record
class Line:
    """What is said of an adapter, and of the base that it was judged on."""

    adapter: AdapterReport
    base: BaseReport


@record
class Reached:
    """When and where, and in how many seconds."""

    at: str
    place: str
    seconds: float


def can_be_kept(adapter: AdapterReport) -> bool:
    """Whether the verdict would be the same at another time."""
    return adapter.verdict is not Verdict.ERROR and math.isfinite(adapter.seconds)


def sealed(line: Line, material: Json, reached: Reached, seal: Seal) -> tuple[Line, Json]:
    """The line with the mark of its judgement, and the document to be kept of it."""
    key = key_of(material)
    document = _document(line, material, reached)
    mark = Judged(
        key=key,
        at=reached.at,
        place=reached.place,
        seconds=reached.seconds,
        seal=seal.of(KIND, key, canonical(document)),
    )
    return replace(line, adapter=replace(line.adapter, judged=mark)), document


def is_sealed(line: Line, material: Json, seal: Seal) -> bool:
    """Whether a line of an earlier report has the mark that the run made which judged it."""
    mark = line.adapter.judged
    if mark is None or mark.key != key_of(material):
        return False
    document = _document(line, material, Reached(at=mark.at, place=mark.place, seconds=mark.seconds))
    return seal.fits(mark.seal, KIND, mark.key, canonical(document))


def _document(line: Line, material: Json, reached: Reached) -> Json:
    return {
        "material": material,
        "at": reached.at,
        "place": reached.place,
        "seconds": reached.seconds,
        "adapter": dump(_nameless(line.adapter)),
        "base": dump(_digestless(line.base)),
    }


def _nameless(adapter: AdapterReport) -> AdapterReport:
    return replace(
        adapter,
        name="",
        source="",
        revision=None,
        line=0,
        column=0,
        seconds=0.0,
        judged=None,
        cached=False,
        accepted=None,
    )


def _digestless(base: BaseReport) -> BaseReport:
    return replace(base, sha256=None)


def restored(document: Json, seal: str, material: Json, entry: Entry) -> Line | None:
    """The line of today's report that a document stands for; None where it is not of this entry, or no verdict.

    `seal` is the one that the document was found with.
    """
    try:
        if not isinstance(document, dict) or document.keys() != _KEYS or document["material"] != material:
            return None
        mark = Judged(
            key=key_of(material),
            at=load(str, document["at"], "at"),
            place=load(str, document["place"], "place"),
            seconds=load(float, document["seconds"], "seconds"),
            seal=seal,
        )
        adapter = replace(load(AdapterReport, document["adapter"], "adapter"), judged=mark)
        return today(Line(adapter=adapter, base=load(BaseReport, document["base"], "base")), entry)
    except (UnreadableError, RecursionError):
        return None


def today(line: Line, entry: Entry) -> Line | None:
    """A line of an earlier run as it stands in this one's report; None where it does not hold."""
    mark = line.adapter.judged
    if mark is None or not _holds(line, entry):
        return None
    if not _is_place(Reached(at=mark.at, place=mark.place, seconds=mark.seconds)):
        return None
    spec = entry.spec
    adapter = replace(
        line.adapter,
        name=spec.name,
        source=spec.source,
        revision=entry.revision,
        line=spec.line,
        column=spec.column,
        seconds=0.0,
        files=entry.files.files,
        cached=True,
        accepted=None,
    )
    return replace(line, adapter=adapter, base=_digestless(line.base))


def _holds(line: Line, entry: Entry) -> bool:
    """Whether the verdict follows from what it rests on, and speaks of this entry's files and base."""
    adapter, base, found = line.adapter, line.base, entry.base
    if found is None or not can_be_kept(adapter) or adapter.files != entry.files.files:
        return False
    if verdict.decide(adapter.findings, adapter.coverage) != (adapter.verdict, adapter.cause, adapter.findings):
        return False
    return adapter.base == base.key and base.revision == found.revision


def _is_place(reached: Reached) -> bool:
    return bool(_AT.fullmatch(reached.at)) and len(reached.place) <= LONGEST_PLACE and 0 <= reached.seconds < math.inf
