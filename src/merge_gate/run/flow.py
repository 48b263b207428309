"""Config → Report, the whole flow on one page.

In: a valid `Config`, a device, an output directory, a view. Out: a `Report`, on disk from the start (provisional) and
as adapters are judged, so that a run that is killed leaves a true one. Imports no torch: the worker process runs what
measures.

1. Names become directories, and the adapters' files are judged on their own.  files/prepare.py,
judging/adapter_report.py
2. Verdicts that an earlier run reached on the same bytes are reused.           cache/verdict_cache.py
3. What is left is grouped by base, dtype and quantisation.                     worker/grouping.py
4. A worker merges; each evidence becomes findings, a verdict and a report.  worker/supervisor.py,
judging/adapter_report.py
5. Verdicts on a base that has changed are void; the rest is the report.        files/base_watch.py, tally.py
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, assert_never

from merge_gate.cache.cached_verdict import CachedVerdict
from merge_gate.cache.device_lookup import MergeDevice, ask_worker
from merge_gate.cache.key import Circumstances
from merge_gate.cache.verdict_cache import Cache, CacheOptions
from merge_gate.config.suggestions import nearest
from merge_gate.errors import GateError, UsageError
from merge_gate.files.base_watch import BaseWatch, base_directory
from merge_gate.files.prepare import Inputs
from merge_gate.judging import adapter_report
from merge_gate.on_ray.job import judge_on_ray
from merge_gate.records.config import AdapterSpec, Config
from merge_gate.records.files import Entry
from merge_gate.records.measured import Evidence
from merge_gate.records.refusals import NotJudged
from merge_gate.records.report import AdapterReport, Report, Shard
from merge_gate.records.terms import Origin, Quantization
from merge_gate.report.stored.output_directory import refuse_input
from merge_gate.report.wording import words
from merge_gate.run.hourly_log import HourlyLog
from merge_gate.run.report_writer import ReportWriter
from merge_gate.run.tally import Tally
from merge_gate.run.view import SilentView
from merge_gate.shards.partition import part_of
from merge_gate.text import counted, listing, quoted
from merge_gate.worker import protocol
from merge_gate.worker.grouping import group_by_base
from merge_gate.worker.memory import MemoryGroup, too_large
from merge_gate.worker.pinned import base_changed
from merge_gate.worker.process import WorkerProcess
from merge_gate.worker.protocol import Event, Group, Job
from merge_gate.worker.supervisor import supervise

if TYPE_CHECKING:
    from merge_gate.run.view import View


def run_gate(
    config: Config,
    *,
    device: str = "auto",
    output: str | None = None,
    view: View | None = None,
    only: tuple[str, ...] = (),
    quick: bool = False,
    shard: tuple[int, int] | None = None,
    cache: CacheOptions = CacheOptions(),  # noqa: B008 - it is frozen
    ray: str | None = None,
    child: WorkerProcess | None = None,
    begins: Callable[[], object] = lambda: None,
) -> Report:
    """Gate every adapter of the config (with `only`: those named; with `shard`, (I, N): the I-th of N parts of them).

    Every element of every touched tensor is merged and measured. With `quick`, a bound may stand for the merge of a
    weight where it proves every value finite and small (engine/blocks/bound.py). `cache` says which verdicts
    of earlier runs are reused, and where those of this one are stored. `ray` is the address of a Ray cluster that
    merges (on_ray/ ray_cluster.py), None for a worker process here. `child` is one that was started before the config
    was known. `begins` is called once no usage error can follow, before the first report is written.

    Raises:
        UsageError: `only` names an adapter that the config does not list, or a directory cannot be used.
        GateError: there is no such cluster, or the report cannot be written.
    """
    specs, part = select(config, only), None
    if output is not None:
        refuse_input(output, _inputs(config))
    if shard is not None:
        specs, part = part_of(config, specs, *shard, quick=quick)
    view = view or SilentView()
    circumstances = Circumstances(
        quick=quick, allow_pickle=config.allow_pickle, trust_remote_code=config.trust_remote_code
    )
    with contextlib.closing(Cache(cache, circumstances, device=device, environ=os.environ, notify=view.note)) as opened:
        run = _Run(config, specs, part, opened, device=device, output=output, view=view, ray=ray)
        if opened.resumed is not None:
            opened.resumed.preserve()
        begins()
        return run.run(quick=quick, child=child)


def _inputs(config: Config) -> Iterator[tuple[str, str]]:
    for spec in config.adapters:
        if spec.path:
            yield spec.path, f"the adapter {quoted(spec.name, 200)}"
        if spec.base.model:
            yield spec.base.model, f"the base {quoted(spec.base.label or spec.base.model, 200)}"


def check_files(config: Config, *, view: View | None = None, only: tuple[str, ...] = ()) -> Iterator[AdapterReport]:
    """Judge config and files alone, with those of bases that are directories here. Torch is not imported."""
    inputs = Inputs(config, (view or SilentView()).note)
    for spec in select(config, only):
        yield adapter_report.checked(inputs.checked(spec))


def select(config: Config, only: tuple[str, ...]) -> tuple[AdapterSpec, ...]:
    """The adapters to gate.

    Raises:
        UsageError: a name that the config does not list.
    """
    known = {spec.name for spec in config.adapters}
    unknown = [name for name in only if name not in known]
    if unknown:
        hint = nearest(unknown[0], known) or f"it lists {listing(sorted(known), 20)}"
        if known.issuperset(several := unknown[0].replace(",", " ").split()):
            hint = f"one at a time: {' '.join(f'--only {shlex.quote(name)}' for name in several)}"
        raise UsageError(f"--only {unknown[0]}: {config.path} lists no such adapter", hint=hint)
    return tuple(spec for spec in config.adapters if not only or spec.name in only)


class _Run:
    """One run: its stages, and how each event adds to what is known."""

    def __init__(
        self,
        config: Config,
        specs: tuple[AdapterSpec, ...],
        shard: Shard | None,
        cache: Cache,
        *,
        device: str,
        output: str | None,
        view: View,
        ray: str | None,
    ) -> None:
        self._config, self._specs, self._device, self._output, self._view = config, specs, device, output, view
        self._ray, self._cache, self._watch = ray, cache, BaseWatch(cache.seen_bases)
        self._tally = Tally(config, shard, device=device, watch=self._watch)
        self._unstored: dict[int, CachedVerdict] = {}
        self._writer = ReportWriter(output, view.note)
        self._hourly = HourlyLog()
        self._groups: tuple[Group, ...] = ()
        self._finished = False

    def run(self, *, quick: bool, child: WorkerProcess | None) -> Report:
        self._writer.write_first(self._tally.report())
        try:
            with self._importing(child) as importing:
                merges = sum(len(spec.base.dtypes) for spec in self._specs)
                self._view.start(self._config.path, len(self._specs), merges)
                self._prepare(quick=quick)
                if importing is not None and not self._groups:
                    importing.end()
                if self._ray is None:
                    supervise(self._job(), self._on_event, importing)
                elif self._groups:
                    judge_on_ray(self._ray, self._job(), self._on_event, self._watch)
                return self._finish()
        except BaseException:
            if not self._finished:
                with contextlib.suppress(GateError):
                    self._writer.write_last(self._tally.report())
            raise

    def _importing(self, child: WorkerProcess | None) -> contextlib.AbstractContextManager[WorkerProcess | None]:
        """The worker that imports while the names become files.

        One that was started without a word of quantisation is of no use where there is some. Where all may have been
        judged and none was started yet, it starts once one has not been.
        """
        quantizes = any(spec.base.quantization is not Quantization.NONE for spec in self._specs)
        if child is not None and not quantizes:
            return contextlib.nullcontext(child)
        if child is not None:
            child.end()
        if self._specs and not self._cache.may_hit and self._ray is None:
            return WorkerProcess(quantizes=quantizes)
        return contextlib.nullcontext()

    def _prepare(self, *, quick: bool) -> None:
        """Stages 1 to 3: what is left to merge is in `_groups`."""
        to_merge = dict(self._loadable())
        self._reuse(to_merge)
        self._groups = group_by_base(to_merge.items(), quick=quick)
        for group in self._groups:
            self._watch.start(group.directory)
        self._groups = tuple(self._in_one_pass(group) for group in self._groups)
        self._hourly.merging_begins(self._tally.judged)

    def _in_one_pass(self, group: Group) -> Group:
        """If the base is larger than the memory, its adapters are merged in one pass over its files."""
        weights = group.files.weights if group.files is not None else ()
        note = too_large(group.base.name, group.directory, MemoryGroup().free_bytes(), weights)
        if note is None:
            return group
        self._view.note(note)
        return replace(group, one_pass=True)

    def _loadable(self) -> Iterator[tuple[int, Entry]]:
        """The entries that their files let be merged; the others are settled."""
        inputs = Inputs(self._config, self._view.note)
        for spec in self._specs:
            self._tally.entries.extend(inputs.entries(spec))
        for index, entry in enumerate(self._tally.entries):
            report = adapter_report.blocked(entry)
            if report is None:
                yield index, entry
                continue
            of_base = adapter_report.base_findings(entry)
            if of_base and entry.base is not None:
                unloaded = adapter_report.of_unloaded_base(report.base, of_base)
                self._tally.use(entry.base.directory, unloaded, index)
            self._settle(index, report)

    def _reuse(self, to_merge: dict[int, Entry]) -> None:
        """Settle the entries whose verdicts are cached, and remove them from `to_merge`."""
        if not self._cache.may_hit:
            return
        device = self._cache.known_device() or ask_worker(self._device)  # may start a process
        if device is None:
            return  # the run's own worker reports why
        self._cache.set_device(device)
        for entry in to_merge.values():
            self._watch.start(base_directory(entry))
        self._watch.wait()
        for index, entry in list(to_merge.items()):
            directory = base_directory(entry)
            content = self._watch.content(directory)
            cached = self._cache.lookup(entry, content) if content is not None else None
            if cached is not None:
                del to_merge[index]
                self._watch.reused(directory, index)
                self._tally.merged_on(device.device, device.name)
                self._tally.use(directory, cached.base, index)
                self._tally.settle(index, cached.adapter)
                self._writer.changed()
                self._view.adapter_done(cached.adapter)

    def _job(self) -> Job:
        return Job(
            groups=self._groups,
            device=self._device,
            allow_pickle=self._config.allow_pickle,
            trust_remote_code=self._config.trust_remote_code,
        )

    def _on_event(self, event: Event) -> None:  # noqa: C901 - a case for each event
        match event:
            case protocol.DeviceChosen():
                self._know_worker(event)
            case protocol.BaseLoading():
                group = self._groups[event.group]
                self._view.base_loading(group.base.name, group.base.dtype)
            case protocol.BaseLoaded():
                group = self._groups[event.group]
                self._tally.use(group.directory, adapter_report.of_base(event.facts, group.files), event.task)
                self._watch.loaded(group.directory, event.identity, (task.index for task in group.tasks))
                self._view.base_loaded(event.facts, event.seconds)
            case protocol.MergeStarted():
                self._catch_up()
                entry = self._tally.entries[event.task]
                position, total = self._tally.judged + 1, self._tally.total
                others = f" and {counted(len(event.others), 'other adapter')}" if event.others else ""
                self._view.adapter_started(entry.spec.name + others, position, total, entry.dtype)
            case protocol.MergeProgressed():
                self._catch_up()
                self._view.adapter_progress(event.done, event.total, event.module)
            case protocol.Merged():
                self._judge(event.task, event.evidence)
            case protocol.Undecided():
                self._settle_undecided(event)
            case protocol.Waiting():
                self._view.note(self._still_at(event))
            case protocol.Idle():
                self._catch_up(at_once=True)
            case protocol.Finished():
                pass  # the last report follows
            case _:
                assert_never(event)

    def _settle_undecided(self, event: protocol.Undecided) -> None:
        report = adapter_report.undecided(self._tally.entries[event.task], event.refusal)
        if base := adapter_report.of_refused_base(report.base, event.refusal):
            directory = next(
                group.directory for group in self._groups if any(task.index == event.task for task in group.tasks)
            )
            self._tally.use(directory, base, event.task)
        self._settle(event.task, report)

    def _still_at(self, event: protocol.Waiting) -> str:
        spent, limit = words.duration(round(event.seconds)), words.duration(event.limit_s)
        if event.task is None:
            return f"base {event.base}: still loading after {spent}; its time limit is {limit}"
        name = self._tally.entries[event.task].spec.name
        return f"{name}: nothing heard of it for {spent}; its time limit is {limit}"

    def _know_worker(self, event: protocol.DeviceChosen) -> None:
        if event.sandbox.missing and not self._tally.sandbox.missing:
            self._view.note(f"the worker's sandbox is not whole: {'; '.join(event.sandbox.missing)}")
        self._cache.set_device(MergeDevice(device=event.device, name=event.device_name))
        self._tally.merged_on(event.device, event.device_name, event.sandbox)

    def _judge(self, index: int, evidence: Evidence) -> None:
        entry = self._tally.entries[index]
        report = adapter_report.merged(entry, evidence)
        base = adapter_report.of_base(evidence.base, entry.base_files)
        self._unstored[index] = CachedVerdict(adapter=report, base=base)
        self._settle(index, report)

    def _settle(self, index: int, report: AdapterReport) -> None:
        """One entry has been judged: its line of the report, on disk and before the reader's eyes."""
        self._tally.settle(index, report)
        self._writer.changed()
        self._catch_up()
        self._view.adapter_done(report)

    def _catch_up(self, *, at_once: bool = False) -> None:
        """What is due by now: verdicts to store, a line in the log, a provisional report."""
        self._store_verdicts()
        if self._hourly.is_due:
            self._view.note(self._hourly.line(self._tally.judged, self._tally.total, self._tally.failed))
        self._writer.catch_up(self._tally.report, at_once=at_once)

    def _store_verdicts(self) -> None:
        """Store the verdicts on bases whose digests are known by now; a digest may take longer than a merge."""
        for index, judged in list(self._unstored.items()):
            entry = self._tally.entries[index]
            directory = base_directory(entry)
            if self._watch.digest(directory) is None:
                continue
            del self._unstored[index]
            content = self._watch.content(directory) if self._watch.is_unchanged(index) else None
            report = self._cache.store(entry, judged, content) if content is not None else None
            if report is not None:
                self._tally.settle(index, report)

    def _withdraw_void(self) -> None:
        for indices in self._watch.void().values():
            base = self._tally.entries[indices[0]].base
            error = base_changed(base.name if base is not None else "")
            refusal = NotJudged(message=error.message, hint=error.hint, origin=Origin.BASE)
            for index in indices:
                self._tally.settle(index, adapter_report.withdrawn(self._tally.entries[index], refusal))
            self._view.note(f"{error.message}; the verdicts on it are withdrawn")

    def _finish(self) -> Report:
        """Stage 5."""
        if self._watch.is_hashing:
            self._catch_up(at_once=True)  # a large base may take minutes
            self._watch.wait()
        self._store_verdicts()
        self._withdraw_void()
        report = self._tally.report(complete=True)
        try:
            self._writer.write_last(report)
        except GateError:
            self._view.finish(report, "")  # the terminal is all that is left
            raise
        self._finished = True
        self._view.finish(report, self._output or "")
        return report
