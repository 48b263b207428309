"""The cache of verdicts: looks up the verdicts of earlier runs with the same key, and stores the verdicts of this run.

A verdict read back must be the one that this run would report: a sealed document becomes today's entry of the report,
or None if the verdict does not apply to it.

In: entries, the digests of their bases, and what the run merges on. Out: cached verdicts, and files in the cache
directory. Judges nothing, hashes nothing, and starts no worker.
"""

from __future__ import annotations

import math
import os
import platform
import re
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from merge_gate.features.cache.key import key_of, material
from merge_gate.features.cache.remembered import BaseRecords, KnownDevices, SeenBases
from merge_gate.features.cache.store import Store, from_environment
from merge_gate.files.identity import identity_of
from merge_gate.judging import verdict
from merge_gate.records.report import AdapterReport, BaseReport, Judged
from merge_gate.records.terms import Verdict, record
from merge_gate.report.formats.fields import UnreadableError, dump, load

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from merge_gate.records.files import BaseContent, Entry
    from merge_gate.records.options import RunOptions
    from merge_gate.worker.protocol import DeviceChosen

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


class Cache:
    """The verdicts of earlier runs, for one run. What the run `trusts` is part of every key (`Config.trusts`).

    Attributes:
        seen_bases: digests of bases that earlier runs stored; None without a cache directory.
        base_records: figures of whole bases that earlier runs measured; None without a cache directory.

    Raises:
        UsageError: the cache directory cannot be used, or `MERGE_GATE_CACHE_KEY` is too short.
    """

    def __init__(
        self,
        options: RunOptions,
        trusts: tuple[str, ...],
        *,
        environ: Mapping[str, str],
        notify: Callable[[str], None],
    ) -> None:
        self._trusts, self._fresh = trusts, options.refresh
        self._device: str | None = None
        seal = from_environment(environ)
        self._place = current_place(environ)
        self._store, self.seen_bases, self.base_records = None, None, None
        if options.cache is not None:
            self._store = Store(options.cache, seal, notify, read_only=options.is_plan)
            self.seen_bases = SeenBases(self._store, fresh=self._fresh)
            self.base_records = BaseRecords(self._store, self._place, fresh=self._fresh, trusts=trusts)
        self._devices = KnownDevices(options.device, self._store, environ)

    def close(self) -> None:
        """Release the cache directory."""
        if self._store is not None:
            self._store.tidy()
            self._store.close()

    @property
    def may_hit(self) -> bool:
        """Whether there is any verdict to reuse."""
        return self._store is not None and not self._fresh and not self._store.is_empty(KIND)

    def known_device(self) -> DeviceChosen | None:
        """What this run would merge on; None if only a worker can tell."""
        return self._devices.lookup()

    def set_device(self, device: DeviceChosen) -> None:
        """Report what the run merges on. Until then, every lookup is a miss and nothing is stored."""
        self._device = "cpu" if device.device == "cpu" else device.device_name  # any processor gives the same verdict
        self._devices.store(device)

    def lookup(self, entry: Entry, base: BaseContent) -> CachedVerdict | None:
        """The verdict of an earlier run on the same bytes, as today's entry of the report; None is a miss."""
        rests_on = self._material(entry, base)
        if rests_on is None or self._store is None or self._fresh:
            return None
        judged = from_document(self._store.get(KIND, key_of(rests_on)), rests_on)
        hit = None if judged is None else for_entry(judged, entry)
        return hit if hit is not None and _is_unchanged(entry) else None

    def store(self, entry: Entry, judged: CachedVerdict, base: BaseContent) -> AdapterReport | None:
        """Write a verdict to the cache directory if there is one. None if no later run may reuse it."""
        rests_on = self._material(entry, base)
        if rests_on is None or not can_be_stored(judged.adapter) or not _is_unchanged(entry):
            return None
        reached = Judged(
            key=key_of(rests_on),
            at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            place=self._place,
            seconds=judged.adapter.seconds,
        )
        if self._store is not None:
            self._store.put(KIND, reached.key, document_of(judged, rests_on, reached))
        return replace(judged.adapter, judged=reached)

    def _material(self, entry: Entry, base: BaseContent) -> Json | None:
        return material(entry, base, self._device, self._trusts) if self._device is not None else None


def _is_unchanged(entry: Entry) -> bool:
    """Whether every file of the adapter is still the file that was hashed."""
    for member in entry.members:
        for file in member.files:
            try:
                if identity_of(file.path, os.stat(f"{member.directory}/{file.path}")) != file.identity:  # noqa: PTH116
                    return False
            except OSError:
                return False
    return True


# --- one verdict -----------------------------------------------------------------------------------------------------


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


def document_of(judged: CachedVerdict, material: Json, reached: Judged) -> Json:
    """What the store holds. Names and places in the config are left out."""
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
