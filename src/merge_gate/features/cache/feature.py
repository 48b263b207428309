"""Reuses the verdicts that earlier runs stored in a directory, and stores those of this run.

In: a run, and the directory of `--cache`. Out: reports of entries that need no merge, and documents in the directory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate.features.cache.cached_verdict import CachedVerdict, document_of, for_entry, from_document
from merge_gate.features.cache.remembered import StoredDevices, StoredDigests, boot_id
from merge_gate.features.cache.store import Seal, Store, from_environment
from merge_gate.files.base_watch import base_directory
from merge_gate.report.stored.output_directory import refuse_input
from merge_gate.report.wording.untrusted import one_line
from merge_gate.run.feature import Feature
from merge_gate.run.verdict_key import device_name, is_unchanged, key_of, material
from merge_gate.worker.protocol import DeviceChosen

if TYPE_CHECKING:
    from merge_gate.files.resolve import Fetching
    from merge_gate.records.files import BaseContent, Entry
    from merge_gate.records.report import AdapterReport, BaseReport
    from merge_gate.run.flow import Run
    from merge_gate.run.verdict_key import Json
    from merge_gate.worker.protocol import Event

KIND = "verdicts"


def join(run: Run) -> Feature:
    """The cache of a run, which may have none.

    Raises:
        UsageError: the directory cannot be used, or the secret is too short.
    """
    seal = from_environment(os.environ)
    directory = run.options.features.get("cache")
    return VerdictCache(run, directory, seal) if directory is not None else Feature()


class VerdictCache(Feature):
    """The verdicts and digests in one directory. With `--refresh`, they are only written."""

    def __init__(self, run: Run, directory: str, seal: Seal) -> None:
        self._run, self._directory, self._fresh = run, directory, run.options.features.get("refresh", False)
        folder = Path(directory).absolute()
        for place in (folder, *folder.parents):
            refuse_input(place, run.inputs, "--cache")
        self._store = Store(directory, seal, run.view.note, read_only=run.options.is_plan)
        boot = boot_id()
        self._devices = StoredDevices(run.options.device, self._store, boot, os.environ)
        self._digests = run.watch.remembered = StoredDigests(self._store, boot, fresh=self._fresh)

    def fetch(self, how: Fetching) -> Fetching:
        return replace(how, known_digests=self._digests.known)

    def close(self) -> None:
        self._store.tidy()
        self._store.close()

    # --- verdicts ----------------------------------------------------------------------------------------------------

    @property
    def may_decide_all(self) -> bool:
        return not self._fresh and not self._store.is_empty(KIND)

    def choose(self, entries: dict[int, Entry]) -> None:
        """Report the entries whose verdicts are cached."""
        if not self.may_decide_all:
            return
        run = self._run
        device = self._devices.lookup()
        if device is None and not run.options.is_plan:
            device = run.worker.choose_device(run.options.device)  # the next job gets a new process
        if device is None:
            return  # the run's own worker reports why
        self._devices.store(device)
        reusable = {index: entry for index, entry in entries.items() if not run.needs_merge(index)}
        for entry in reusable.values():
            run.watch.start(base_directory(entry))
        run.watch.wait()
        for index, entry in reusable.items():
            directory = base_directory(entry)
            content = run.watch.content(directory)
            cached = self.lookup(entry, content, device) if content is not None else None
            if cached is not None:
                del entries[index]
                run.watch.reused(directory, index)
                run.tally.merged_on(device.device, device.device_name)
                run.tally.use(directory, cached.base, index)
                run.tally.set_report(index, cached.adapter)
                run.writer.changed()
                run.view.adapter_done(cached.adapter)

    def lookup(self, entry: Entry, base: BaseContent, device: DeviceChosen) -> CachedVerdict | None:
        """The verdict of an earlier run on the same bytes, as today's entry of the report; None is a miss."""
        rests_on = material(entry, base, device_name(device), self._run.config.trusts)
        cached = None if self._fresh else from_document(self._store.get(KIND, key_of(rests_on)), rests_on)
        hit = None if cached is None else for_entry(cached, entry)
        return hit if hit is not None and is_unchanged(entry) else None

    def decided(self, report: AdapterReport, base: BaseReport, material: Json) -> None:
        """Store a verdict that later runs may reuse."""
        self._store.put(KIND, key_of(material), document_of(CachedVerdict(adapter=report, base=base), material))

    # --- the rest ----------------------------------------------------------------------------------------------------

    def plan(self) -> Iterator[tuple[str, str]]:
        yield "cache", f"{one_line(self._directory, 120)}: stored verdicts need no merge"

    def received(self, event: Event) -> None:
        if isinstance(event, DeviceChosen):
            self._devices.store(event)
