"""The cache of verdicts: looks up the verdicts of earlier runs with the same key, and stores the verdicts of this run.

In: entries, the digests of their bases, and what the run merges on. Out: cached verdicts, and files in the cache
directory. Judges nothing, hashes nothing, and starts no worker.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from merge_gate.cache import cached_verdict
from merge_gate.cache.base_records import BaseRecords
from merge_gate.cache.cached_verdict import KIND, CachedVerdict
from merge_gate.cache.device_lookup import KnownDevices, MergeDevice
from merge_gate.cache.key import Circumstances, key_of, material
from merge_gate.cache.resume import ResumedVerdicts
from merge_gate.cache.seal import from_environment
from merge_gate.cache.seen import SeenBases
from merge_gate.cache.store import Store
from merge_gate.files.identity import identity_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from merge_gate.records.files import BaseContent, Entry
    from merge_gate.records.options import CacheOptions
    from merge_gate.records.report import AdapterReport

Json = Any


class VerdictSource(Protocol):
    """Verdicts of earlier runs whose seals fit. A source is only read."""

    @property
    def is_empty(self) -> bool: ...

    def find(self, key: str, material: Json) -> Iterator[CachedVerdict]:
        """The verdicts with this key and material."""


class StoredVerdicts:
    """The verdicts in the cache directory."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @property
    def is_empty(self) -> bool:
        return self._store.is_empty(KIND)

    def find(self, key: str, material: Json) -> Iterator[CachedVerdict]:
        sealed = self._store.get_sealed(KIND, key)
        judged = cached_verdict.from_document(sealed.document, sealed.seal, material) if sealed else None
        if judged is not None:
            yield judged


class Cache:
    """The verdicts of earlier runs, for one run. `device` is the requested device, which may be `auto`.

    Attributes:
        resumed: the verdicts in earlier reports; None without `--resume`.
        seen_bases: digests of bases that earlier runs stored; None without a cache directory.
        base_records: figures of whole bases that earlier runs measured; None without a cache directory.

    Raises:
        UsageError: the cache directory cannot be used, or `MERGE_GATE_CACHE_KEY` is too short.
    """

    def __init__(
        self,
        options: CacheOptions,
        circumstances: Circumstances,
        *,
        device: str,
        environ: Mapping[str, str],
        notify: Callable[[str], None],
    ) -> None:
        self._circumstances = circumstances
        self._seal = from_environment(environ)
        self._place = cached_verdict.current_place(environ)
        self._store = None
        if options.directory is not None:
            self._store = Store(options.directory, self._seal, notify, read_only=options.read_only)
        self._devices = KnownDevices(device, self._store, environ)
        trusted = {
            "allow-pickle": circumstances.allow_pickle,
            "trust-remote-code": circumstances.trust_remote_code,
        }
        trusts = tuple(name for name, is_trusted in trusted.items() if is_trusted)
        self.base_records = (
            BaseRecords(self._store, self._place, fresh=not options.reuse, trusts=trusts) if self._store else None
        )
        self.seen_bases = SeenBases(self._store, fresh=not options.reuse) if self._store else None
        self.resumed = ResumedVerdicts(options.resume, self._seal) if options.resume is not None else None
        for note in self.resumed.notes if self.resumed else ():
            notify(note)
        stored = StoredVerdicts(self._store) if self._store and options.reuse else None
        sources: tuple[VerdictSource | None, ...] = (self.resumed, stored)
        self._sources = tuple(source for source in sources if source is not None)

    def close(self) -> None:
        """Release the cache directory."""
        if self._store is not None:
            self._store.tidy()
            self._store.close()

    @property
    def may_hit(self) -> bool:
        """Whether there is any verdict to reuse."""
        return any(not source.is_empty for source in self._sources)

    def known_device(self) -> MergeDevice | None:
        """What this run would merge on; None if only a worker can tell."""
        return self._devices.lookup()

    def set_device(self, device: MergeDevice) -> None:
        """Report what the run merges on. Until then, every lookup is a miss and nothing is stored."""
        self._circumstances = replace(self._circumstances, device=device.in_key)
        self._devices.store(device)

    def lookup(self, entry: Entry, base: BaseContent) -> CachedVerdict | None:
        """The verdict of an earlier run on the same bytes, as today's entry of the report; None is a miss."""
        rests_on = self._material(entry, base)
        if rests_on is None:
            return None
        key = key_of(rests_on)
        for source in self._sources:
            for judged in source.find(key, rests_on):
                hit = cached_verdict.for_entry(judged, entry)
                if hit is not None and _is_unchanged(entry):
                    return hit
        return None

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
        return material(entry, base, self._circumstances) if self._circumstances.device is not None else None


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
