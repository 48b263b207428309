"""A verdict in the form that the cache stores. A verdict read back must be the one that this run would report.

Storing: a verdict and the material of its key become a sealed verdict and its document. Reading: a document, or the
entry of an earlier report, and today's `Entry` become today's entry of the report. The result is None if the verdict
does not apply to it.
"""

from __future__ import annotations

import math
import platform
import re
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from merge_gate.cache.key import canonical, key_of
from merge_gate.judging import verdict
from merge_gate.records.report import AdapterReport, BaseReport, Judged
from merge_gate.records.terms import Verdict, record
from merge_gate.report.formats.fields import UnreadableError, dump, load

if TYPE_CHECKING:
    from collections.abc import Mapping

    from merge_gate.cache.seal import Seal
    from merge_gate.records.files import Entry

Json = Any

KIND = "verdicts"
_KEYS = {"material", "at", "place", "seconds", "adapter", "base"}
_AT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")

PLACE_VARIABLE = "MERGE_GATE_PLACE"
"""The action sets it, because its gate sees no variable of the runner."""
LONGEST_PLACE = 200
_CI_RUNS = (
    ("GITHUB_REPOSITORY", "GITHUB_RUN_ID"),
    ("CI_PROJECT_PATH", "CI_JOB_ID"),
    ("JOB_NAME", "BUILD_NUMBER"),
)
"""Variables that name a project and a run of it: GitHub's (and Gitea's), GitLab's, Jenkins'."""


@record
class CachedVerdict:
    """An adapter's entry in the report, and that of the base it was judged on."""

    adapter: AdapterReport
    base: BaseReport


def can_be_stored(adapter: AdapterReport) -> bool:
    """Whether another run would reach the same verdict. `error` is about one run.

    A verdict that rests on the record of an earlier run is not stored, so that no verdict rests on it at second hand.
    """
    from_record = adapter.coverage.parameters_from_record
    return adapter.verdict is not Verdict.ERROR and not from_record and math.isfinite(adapter.seconds)


def current_place(environ: Mapping[str, str]) -> str:
    """The CI run (`acme/adapters run 123`), or the name of the machine. It contains no local path."""
    if environ.get(PLACE_VARIABLE):
        return environ[PLACE_VARIABLE][:LONGEST_PLACE]
    for project, run in _CI_RUNS:
        if environ.get(project) and environ.get(run):
            return f"{environ[project]} run {environ[run]}"[:LONGEST_PLACE]
    return platform.node()[:LONGEST_PLACE] or "unknown"


def sealed(judged: CachedVerdict, material: Json, place: str, seal: Seal) -> CachedVerdict:
    """The verdict with the record of when and where it was reached, and a seal over all of it."""
    unsealed = Judged(
        key=key_of(material),
        at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        place=place,
        seconds=judged.adapter.seconds,
        seal="",
    )
    body = canonical(document_of(judged, material, unsealed))
    return _with(judged, replace(unsealed, seal=seal.of(KIND, unsealed.key, body)))


def is_sealed(judged: CachedVerdict, material: Json, seal: Seal) -> bool:
    """Whether the seal of a verdict fits, so that a run with this secret reached exactly it, on this material."""
    reached = judged.adapter.judged
    if reached is None:
        return False
    return seal.fits(reached.seal, KIND, reached.key, canonical(document_of(judged, material, reached)))


def document_of(judged: CachedVerdict, material: Json, reached: Judged) -> Json:
    """What the seal covers, and what the store holds. Names and places in the config are left out."""
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


def from_document(document: Json, seal: str, material: Json) -> CachedVerdict | None:
    """The verdict in a document whose seal fits; None if it is not a verdict on this material."""
    try:
        if not isinstance(document, dict) or document.keys() != _KEYS or document["material"] != material:
            return None
        reached = Judged(
            key=key_of(material),
            at=load(str, document["at"], "at"),
            place=load(str, document["place"], "place"),
            seconds=load(float, document["seconds"], "seconds"),
            seal=seal,
        )
        adapter = verdict.with_decision(load(AdapterReport, document["adapter"], "adapter"))
        base = load(BaseReport, document["base"], "base")
        return _with(CachedVerdict(adapter=adapter, base=base), reached)
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


def _with(judged: CachedVerdict, reached: Judged) -> CachedVerdict:
    return replace(judged, adapter=replace(judged.adapter, judged=reached))


def _is_plausible(adapter: AdapterReport) -> bool:
    """Whether the verdict follows from its findings and coverage, by the rules that a run applies."""
    reached = adapter.judged
    if reached is None or not can_be_stored(adapter):
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
