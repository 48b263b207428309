"""Reuses the verdicts and the figures of bases that earlier runs stored in a directory, and stores those of this run.

In: a run, and the directory of `--cache`. Out: reports of entries that need no merge, and documents in the directory.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate.features.cache.cached_verdict import CachedVerdict, document_of, for_entry, from_document
from merge_gate.features.cache.remembered import StoredDevices, StoredDigests, StoredFigures, boot_id
from merge_gate.features.cache.store import Seal, Store, from_environment
from merge_gate.files.base_watch import base_directory
from merge_gate.records.terms import BaseKey, Read
from merge_gate.report.stored.output_directory import refuse_input
from merge_gate.report.wording.untrusted import one_line
from merge_gate.run.feature import Feature
from merge_gate.run.verdict_key import current_place, device_name, is_unchanged, key_of, material
from merge_gate.worker.protocol import BaseMeasured, DeviceChosen

if TYPE_CHECKING:
    from merge_gate.files.resolve import Fetching
    from merge_gate.records.files import BaseContent, Entry
    from merge_gate.records.measured import BaseFigures
    from merge_gate.records.report import AdapterReport, BaseReport
    from merge_gate.run.flow import Run
    from merge_gate.run.verdict_key import Json
    from merge_gate.worker.protocol import Event, Group

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
    """The verdicts, digests, and figures in one directory. With `--refresh`, they are only written."""

    def __init__(self, run: Run, directory: str, seal: Seal) -> None:
        self._run, self._directory, self._fresh = run, directory, run.options.features.get("refresh", False)
        folder = Path(directory).absolute()
        for place in (folder, *folder.parents):
            refuse_input(place, run.inputs, "--cache")
        self._store = Store(directory, seal, run.view.note, read_only=run.options.is_plan)
        boot = boot_id()
        self._devices = StoredDevices(run.options.device, self._store, boot, os.environ)
        here, trusts = current_place(os.environ, platform.node()), run.config.trusts
        self._figures = StoredFigures(self._store, here, fresh=self._fresh, trusts=trusts)
        self._measured: dict[tuple[str, BaseKey, str], tuple[Group, BaseFigures]] = {}
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

    # --- figures of bases --------------------------------------------------------------------------------------------

    def plan(self) -> Iterator[tuple[str, str]]:
        yield "cache", f"{one_line(self._directory, 120)}: stored verdicts need no merge"

    def schedule(self, groups: Sequence[Group]) -> Iterator[Group]:
        return map(self._with_figures, groups)

    def _with_figures(self, group: Group) -> Group:
        """The group, with the figures that earlier runs measured of its base, unless this run reads all of it."""
        figures: tuple[BaseFigures, ...] = ()
        is_here = group.files.on_hub is None  # the figures are stored by a digest, which needs the files
        if is_here and self._run.read_of(group) is not Read.WHOLE:
            self._run.watch.recall(group.directory)
            content = self._run.watch.content(group.directory)
            figures = self._figures.lookup(group.base, content) if content is not None else ()
        return replace(group, earlier_figures=figures, keeps_figures=group.plain_dtype is None)

    def received(self, event: Event) -> None:
        match event:
            case DeviceChosen():
                self._devices.store(event)
            case BaseMeasured(figures=figures) if figures is not None:
                group = self._run.groups[event.group]
                self._measured[group.directory, group.base, figures.model_class] = group, figures

    def finish(self) -> None:
        """Store what this run measured of bases whose bytes have a digest."""
        watch = self._run.watch
        for group, figures in self._measured.values():
            content = watch.content(group.directory)
            is_proven = watch.digest(group.directory) is not None and not watch.is_only_listed(group.directory)
            if content is not None and is_proven:
                with suppress(Exception):  # a record that is not stored costs a later run its time
                    self._figures.store(group.base, content, figures)
