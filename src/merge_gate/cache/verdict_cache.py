"""The cache of verdicts: looks up the verdicts of earlier runs with the same key, and stores the verdicts of this run.

In: entries, the digests of their bases, and what the run merges on; and an output directory, for the verdicts in its
reports and in those of `previous/`, `previous-2/`, and so on (`--resume`). Out: cached verdicts, and files in the cache
directory. Judges nothing, hashes nothing, and starts no worker.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate.cache import cached_verdict
from merge_gate.cache.cached_verdict import KIND, CachedVerdict, is_sealed
from merge_gate.cache.key import key_of, material
from merge_gate.cache.remembered import BaseRecords, KnownDevices, SeenBases
from merge_gate.cache.seal import from_environment
from merge_gate.cache.store import Store
from merge_gate.earlier_reports import RESUMED, is_own, places
from merge_gate.errors import UsageError
from merge_gate.files.identity import identity_of
from merge_gate.regular_file import open_regular_file
from merge_gate.report.formats import json_report
from merge_gate.report.stored.report_files import read_report, write_text
from merge_gate.text import listing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from merge_gate.cache.seal import Seal
    from merge_gate.records.files import BaseContent, Entry
    from merge_gate.records.options import RunOptions
    from merge_gate.records.report import AdapterReport, Report
    from merge_gate.worker.protocol import DeviceChosen

Json = Any

_NOTHING = "nothing to resume: the output directory holds no verdict of an earlier run, so every adapter is judged"


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
        self._place = cached_verdict.current_place(environ)
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
            hit = cached_verdict.for_entry(judged, entry)
            if hit is not None and _is_unchanged(entry):
                return hit
        return None

    def _found(self, key: str, rests_on: Json) -> Iterator[CachedVerdict]:
        """The verdicts with this key and material whose seals fit: in earlier reports, and in the directory."""
        if self.resumed is not None:
            yield from self.resumed.find(key, rests_on)
        sealed = self._store.get_sealed(KIND, key) if self._store is not None and not self._fresh else None
        judged = cached_verdict.from_document(sealed.document, sealed.seal, rests_on) if sealed else None
        if judged is not None:
            yield judged

    def store(self, entry: Entry, judged: CachedVerdict, base: BaseContent) -> AdapterReport | None:
        """Seal a verdict, and write it to the cache directory if there is one. None if no later run may reuse it."""
        rests_on = self._material(entry, base)
        if rests_on is None or not cached_verdict.can_be_stored(judged.adapter) or not _is_unchanged(entry):
            return None
        adapter = cached_verdict.sealed(judged, rests_on, self._place, self._seal).adapter
        if self._store is not None and adapter.judged is not None:
            self._store.put(KIND, adapter.judged.key, cached_verdict.document_of(judged, rests_on, adapter.judged))
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
        for path in _reports_in(self._directory):
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


def _reports_in(directory: Path) -> Iterator[Path]:
    for place in places(directory):
        if place == directory or not place.is_symlink():
            yield from (path for name in ("report.json", RESUMED) if is_own(path := place / name))


def _read(path: Path) -> Report | None:
    """The report in a file; None if it is damaged, too large, or not a regular file."""
    try:
        with open_regular_file(path) as file:
            return read_report(file, path.name)
    except (OSError, UsageError):
        return None
