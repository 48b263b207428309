"""A verdict in the cache: a document that a run seals, and that a later run reads as its own entry of the report.

A verdict read back must be the one that this run would report, or None if it does not apply to the entry.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

from merge_gate.judging import verdict
from merge_gate.records.files import Entry
from merge_gate.records.report import AdapterReport, BaseReport, Judged
from merge_gate.records.terms import record
from merge_gate.report.formats.fields import UnreadableError, dump, load
from merge_gate.run.verdict_key import LONGEST_PLACE, Json, key_of, may_have_key

_KEYS = {"material", "at", "place", "seconds", "adapter", "base"}
_AT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


@record
class CachedVerdict:
    """An adapter's entry in the report, and that of the base it was judged on."""

    adapter: AdapterReport
    base: BaseReport


def document_of(judged: CachedVerdict, material: Json) -> Json:
    """What the store holds of a verdict with a key. Names and places in the config are left out."""
    reached = judged.adapter.judged
    if reached is None:
        raise AssertionError("the verdict has no key")
    adapter = replace(
        judged.adapter,
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
    return {
        "material": material,
        "at": reached.at,
        "place": reached.place,
        "seconds": reached.seconds,
        "adapter": dump(adapter),
        "base": dump(judged.base.bare),
    }


def from_document(document: Json, material: Json) -> CachedVerdict | None:
    """The verdict in a document of the store; None if it is not a verdict on this material."""
    try:
        if not isinstance(document, dict) or document.keys() != _KEYS or document["material"] != material:
            return None
        reached = Judged(
            key=key_of(material),
            at=load(str, document["at"], "at"),
            place=load(str, document["place"], "place"),
            seconds=load(float, document["seconds"], "seconds"),
        )
        adapter = verdict.with_decision(load(AdapterReport, document["adapter"], "adapter"))
        base = load(BaseReport, document["base"], "base")
        return CachedVerdict(adapter=replace(adapter, judged=reached), base=base)
    except (UnreadableError, RecursionError):
        return None


def for_entry(judged: CachedVerdict, entry: Entry) -> CachedVerdict | None:
    """The verdict as today's entry of the report, with its names and its place. None if it does not hold."""
    if not _is_plausible(judged.adapter) or not _fits(judged, entry):
        return None
    spec = entry.spec
    adapter = replace(
        judged.adapter,
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
    return CachedVerdict(adapter=adapter, base=judged.base.bare)


def _is_plausible(adapter: AdapterReport) -> bool:
    """Whether the verdict follows from its findings and coverage, by the rules that a run applies."""
    reached = adapter.judged
    if reached is None or not may_have_key(adapter):
        return False
    if not _AT.fullmatch(reached.at) or len(reached.place) > LONGEST_PLACE or not 0 <= reached.seconds < math.inf:
        return False
    what, index, findings = verdict.decide(adapter.findings, adapter.coverage)
    cause = None if index is None else findings[index].check
    return (what, index, cause, findings) == (adapter.verdict, adapter.decided_by, adapter.cause, adapter.findings)


def _fits(judged: CachedVerdict, entry: Entry) -> bool:
    """Whether the verdict is about the files and the base of this entry."""
    base, files = entry.base, entry.files.files
    return (
        base is not None
        and judged.adapter.files == files
        and judged.adapter.base == judged.base.key
        and judged.base.revision == base.revision
    )
