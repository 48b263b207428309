"""The cache of verdicts: looks up the verdicts of earlier runs with the same key, and stores the verdicts of this run.

A verdict read back must be the one that this run would report. It is sealed: a document, or the entry of an earlier
report, becomes today's entry of the report, or None if the verdict does not apply to it.

In: entries, the digests of their bases, and what the run merges on; and an output directory, for the verdicts in its
reports and in those of `previous/`, `previous-2/`, and so on (`--resume`). Out: cached verdicts, and files in the cache
directory. Judges nothing, hashes nothing, and starts no worker.
"""

from __future__ import annotations

import math
import os
import platform
import re
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate._internal.earlier_reports import RESUMED, is_own, places
from merge_gate._internal.errors import UsageError
from merge_gate._internal.regular_file import open_regular_file
from merge_gate._internal.text import listing
from merge_gate.cache.key import canonical, key_of, material
from merge_gate.cache.remembered import BaseRecords, KnownDevices, SeenBases
from merge_gate.cache.store import Seal, Store, from_environment
from merge_gate.files.identity import identity_of
from merge_gate.judging import verdict
from merge_gate.records.report import AdapterReport, BaseReport, Judged, Report
from merge_gate.records.terms import Verdict, record
from merge_gate.report.formats import json_report
from merge_gate.report.formats.fields import UnreadableError, dump, load
from merge_gate.report.stored.report_files import read_report, write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from merge_gate.records.files import BaseContent, Entry
    from merge_gate.records.options import RunOptions
    from merge_gate.worker.protocol import DeviceChosen

Json = Any

_NOTHING = "nothing to resume: the output directory holds no verdict of an earlier run, so every adapter is judged"
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
        resumed: the verdicts in earlier reports; None without `--resume`.
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
        self._seal = from_environment(environ)
        self._place = current_place(environ)
        self._store, self.seen_bases, self.base_records = None, None, None
        if options.cache is not None:
            self._store = Store(options.cache, self._seal, notify, read_only=options.is_plan)
            self.seen_bases = SeenBases(self._store, fresh=self._fresh)
            self.base_records = BaseRecords(self._store, self._place, fresh=self._fresh, trusts=trusts)
        self._devices = KnownDevices(options.device, self._store, environ)
        self.resumed = ResumedVerdicts(options.resume, self._seal) if options.resume is not None else None
        for note in self.resumed.notes if self.resumed else ():
            notify(note)

    def close(self) -> None:
        """Release the cache directory."""
        if self._store is not None:
            self._store.tidy()
            self._store.close()

    @property
    def may_hit(self) -> bool:
        """Whether there is any verdict to reuse."""
        is_stored = self._store is not None and not self._fresh and not self._store.is_empty(KIND)
        return is_stored or (self.resumed is not None and not self.resumed.is_empty)

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
        if rests_on is None:
            return None
        for judged in self._found(key_of(rests_on), rests_on):
            hit = for_entry(judged, entry)
            if hit is not None and _is_unchanged(entry):
                return hit
        return None

    def _found(self, key: str, rests_on: Json) -> Iterator[CachedVerdict]:
        """The verdicts with this key and material whose seals fit: in earlier reports, and in the directory."""
        if self.resumed is not None:
            yield from self.resumed.find(key, rests_on)
        if self._store is not None and not self._fresh:
            seal, document = self._store.get_sealed(KIND, key)
            if (judged := from_document(document, seal, rests_on)) is not None:
                yield judged

    def store(self, entry: Entry, judged: CachedVerdict, base: BaseContent) -> AdapterReport | None:
        """Seal a verdict, and write it to the cache directory if there is one. None if no later run may reuse it."""
        rests_on = self._material(entry, base)
        if rests_on is None or not can_be_stored(judged.adapter) or not _is_unchanged(entry):
            return None
        adapter = sealed(judged, rests_on, self._place, self._seal).adapter
        if self._store is not None and adapter.judged is not None:
            self._store.put(KIND, adapter.judged.key, document_of(judged, rests_on, adapter.judged))
        return adapter

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


# --- earlier reports -------------------------------------------------------------------------------------------------


class ResumedVerdicts:
    """The verdicts in the earlier reports of one output directory, as killed runs have left them.

    While the new run continues, they are also in one file next to its report, so that a second kill loses nothing. An
    entry of a report names its base, and several bases can have one name. The seal shows which of them is meant.
    """

    def __init__(self, directory: str, seal: Seal) -> None:
        self._directory, self._seal = Path(directory), seal
        self._reports: list[Report] = []
        self._verdicts: dict[str, list[CachedVerdict]] = {}
        used: list[Path] = []
        damaged: list[Path] = []
        folders = (place for place in places(self._directory) if place == self._directory or not place.is_symlink())
        for path in (folder / name for folder in folders for name in ("report.json", RESUMED)):
            if not is_own(path):
                continue
            report = _read(path)
            if report is None:
                damaged.append(path)
            elif self._add(report):
                used.append(path.parent)
        self.notes = [f"{path} is damaged, so none of its verdicts are reused" for path in damaged]
        places_used = listing(str(place) for place in dict.fromkeys(used))
        self.notes.append(_NOTHING if self.is_empty else f"--resume reuses the verdicts in {places_used}")

    @property
    def is_empty(self) -> bool:
        return not self._verdicts

    def find(self, key: str, material: Json) -> Iterator[CachedVerdict]:
        """The verdicts with this key whose seal fits."""
        return (judged for judged in self._verdicts.get(key, ()) if is_sealed(judged, material, self._seal))

    def preserve(self) -> None:
        """Write all verdicts to one file in the output directory, because a new run replaces their reports.

        Raises:
            UsageError: the file cannot be written.
        """
        if self.is_empty:
            return
        adapters = dict.fromkeys(
            adapter for report in self._reports for adapter in report.adapters if adapter.judged is not None
        )
        bases = dict.fromkeys(base for report in self._reports for base in report.bases)
        union = replace(self._reports[0], complete=False, adapters=tuple(adapters), bases=tuple(bases))
        write_text(self._directory / RESUMED, json_report.render(union))

    def _add(self, report: Report) -> bool:
        """Whether the report contains a verdict that can be reused."""
        adapters = [adapter for adapter in report.adapters if adapter.judged is not None]
        for adapter in adapters:
            if adapter.judged is not None:
                on = [CachedVerdict(adapter=adapter, base=base) for base in report.bases if adapter.base == base.key]
                self._verdicts.setdefault(adapter.judged.key, []).extend(on)
        if adapters:
            self._reports.append(report)
        return bool(adapters)


def forget(directory: str) -> None:
    """Remove the file that `ResumedVerdicts.preserve` wrote, because the run is complete."""
    path = Path(directory, RESUMED)
    with suppress(OSError):
        if is_own(path):
            path.unlink()


def _read(path: Path) -> Report | None:
    """The report in a file; None if it is damaged, too large, or not a regular file."""
    try:
        with open_regular_file(path) as file:
            return read_report(file, path.name)
    except (OSError, UsageError):
        return None


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
