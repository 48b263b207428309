"""Config → Report, the whole flow on one page.

In: a valid `Config`, a device, an output directory, a view. Out: a `Report`, on disk from the start (provisional) and
as adapters are judged, so that a run that is killed leaves a true one. Imports no torch: the worker process runs what
measures.

1. Names become directories, and the adapters' files are judged on their own.   sources/inputs.py, judging/outcome.py
2. What an earlier run has judged is taken over.                                fleet/keeper.py
3. What is left is grouped by base, dtype and quantisation.                     engine/grouping.py
4. A worker merges; each evidence becomes findings, a verdict and a report.     engine/supervisor.py, judging/outcome.py
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import platform
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING, assert_never

from merge_gate import __version__
from merge_gate.engine.grouping import group_by_base
from merge_gate.engine.memory import MemoryGroup, too_large
from merge_gate.engine.pinned import base_changed
from merge_gate.engine.process import WorkerProcess
from merge_gate.engine.protocol import (
    BaseLoaded,
    BaseLoading,
    DeviceChosen,
    Event,
    Finished,
    Group,
    Idle,
    Job,
    Merged,
    MergeProgressed,
    MergeStarted,
    Undecided,
    Waiting,
)
from merge_gate.engine.supervisor import supervise
from merge_gate.errors import GateError, UsageError
from merge_gate.fleet.bases import Used, in_order
from merge_gate.fleet.keeper import NOTHING, Keeper, Keeping
from merge_gate.fleet.on_ray import judge_on_ray
from merge_gate.fleet.partition import part_of
from merge_gate.fleet.progress import Hourly
from merge_gate.fleet.verdicts import Line
from merge_gate.judging import outcome
from merge_gate.judging.baseline import accept
from merge_gate.judging.bounds import bounded
from merge_gate.judging.finite import findings_of_base
from merge_gate.records.config import AdapterSpec, Config
from merge_gate.records.files import Entry, FileIdentity
from merge_gate.records.measured import BaseFacts, Refusal
from merge_gate.records.report import AdapterReport, BaseReport, Environment, Report, Shard
from merge_gate.records.terms import Origin, Quantization, Verdict
from merge_gate.report import words
from merge_gate.report.provisional import ReportWriter
from merge_gate.report.terminal import SilentView
from merge_gate.sources.inputs import Inputs

if TYPE_CHECKING:
    from merge_gate.report.terminal import View


def run_gate(
    config: Config,
    *,
    device: str = "auto",
    output: str | None = None,
    view: View | None = None,
    only: tuple[str, ...] = (),
    quick: bool = False,
    shard: tuple[int, int] | None = None,
    keeping: Keeping = NOTHING,
    ray: str | None = None,
) -> Report:
    """Gate every adapter of the config (with `only`: those named; with `shard`, (I, N): the I-th of N parts of them).

    Every element of every touched tensor is merged and measured. With `quick`, a bound may stand for the merge of a
    weight where it proves every value finite and small (engine/bound.py). `keeping` says which verdicts of earlier runs
    are taken over, and where those of this one are kept. `ray` is the address of a Ray cluster that merges (fleet/
    ray_cluster.py), None for a worker process here.

    Raises:
        UsageError: `only` names an adapter that the config does not list, or a directory cannot be used.
        GateError: there is no such cluster, or the report cannot be written.
    """
    specs, part = select(config, only), None
    if shard is not None:
        specs, part = part_of(config, specs, *shard, quick=quick)
    view = view or SilentView()
    with contextlib.closing(
        Keeper(config, keeping, device=device, quick=quick, environ=os.environ, notify=view.note)
    ) as keeper:
        run = _Run(config, specs, part, keeper, device=device, output=output, view=view, ray=ray)
        return run.run(quick=quick)


def check_files(config: Config, *, view: View | None = None, only: tuple[str, ...] = ()) -> Iterator[AdapterReport]:
    """Judge config and files alone: no base is resolved, no model is loaded, torch is not imported."""
    inputs = Inputs(config, (view or SilentView()).note)
    for spec in select(config, only):
        yield outcome.checked(inputs.adapter(spec))


def select(config: Config, only: tuple[str, ...]) -> tuple[AdapterSpec, ...]:
    """The adapters to gate.

    Raises:
        UsageError: a name that the config does not list.
    """
    known = {spec.name for spec in config.adapters}
    unknown = [name for name in only if name not in known]
    if unknown:
        listed = ", ".join(sorted(known)[:20])
        raise UsageError(f"--only {unknown[0]}: {config.path} lists no such adapter", hint=f"it lists {listed}")
    return tuple(spec for spec in config.adapters if not only or spec.name in only)


class _Run:
    """One run: what is known so far, and how each event adds to it."""

    def __init__(
        self,
        config: Config,
        specs: tuple[AdapterSpec, ...],
        shard: Shard | None,
        keeper: Keeper,
        *,
        device: str,
        output: str | None,
        view: View,
        ray: str | None,
    ) -> None:
        self._ray = ray
        self._config, self._specs, self._device, self._output, self._view = config, specs, device, output, view
        self._shard, self._keeper, self._digests = shard, keeper, keeper.digests
        self._writer = ReportWriter(output, view.note)
        self._environment = _environment(device)
        self._entries: list[Entry] = []
        self._groups: tuple[Group, ...] = ()
        self._group_of: dict[int, int] = {}
        self._bases: dict[tuple[str, BaseReport], int] = {}
        self._identities: dict[int, set[tuple[FileIdentity, ...]]] = {}
        self._reports: dict[int, AdapterReport] = {}
        self._taken_over: set[int] = set()
        self._unkept: dict[int, BaseReport] = {}
        self._hourly = Hourly()
        self._today = dt.datetime.now(dt.UTC).date()
        self._finished = False

    def run(self, *, quick: bool) -> Report:
        self._writer.write_first(self._report())
        try:
            quantizes = any(spec.base.quantization is not Quantization.NONE for spec in self._specs)
            # It imports while the names become files; where all may have been judged, it starts once one has not been.
            at_once = self._specs and not self._keeper.looks_back and self._ray is None
            with WorkerProcess(quantizes=quantizes) if at_once else contextlib.nullcontext() as child:
                self._view.start(self._config.path, sum(len(spec.base.dtypes) for spec in self._specs))
                self._prepare(quick=quick)
                if self._ray is None:
                    supervise(self._job(), self._on_event, child)
                elif self._groups:
                    judge_on_ray(self._ray, self._job(), self._on_event, self._digests)
                return self._finish()
        except BaseException:
            if not self._finished:
                with contextlib.suppress(GateError):
                    self._writer.write_last(self._report())
            raise

    def _prepare(self, *, quick: bool) -> None:
        inputs = Inputs(self._config, self._view.note)
        for spec in self._specs:
            prepared = inputs.prepare(spec)
            self._entries.extend(Entry(prepared=prepared, dtype=dtype) for dtype in spec.base.dtypes)
        to_merge = []
        for index, entry in enumerate(self._entries):
            report = outcome.blocked(entry)
            if report is None:
                to_merge.append((index, entry))
            else:
                self._settle(index, report)
        for index, line in self._keeper.take_over(to_merge):
            self._take_over(index, line)
        self._groups = group_by_base([one for one in to_merge if one[0] not in self._taken_over], quick=quick)
        self._group_of = {task.index: at for at, group in enumerate(self._groups) for task in group.tasks}
        free_bytes = MemoryGroup().free_bytes()
        for group in self._groups:
            self._digests.start(group.directory)
            if said := too_large(group.label, group.directory, free_bytes):
                self._view.note(said)
        self._hourly.merging_begins(len(self._reports))
        if self._groups:
            self._catch_up(at_once=True)

    def _job(self) -> Job:
        return Job(
            groups=self._groups,
            device=self._device,
            allow_pickle=self._config.allow_pickle,
            trust_remote_code=self._config.trust_remote_code,
        )

    def _on_event(self, event: Event) -> None:
        match event:
            case DeviceChosen():
                self._know_worker(event)
            case BaseLoading():
                group = self._groups[event.group]
                self._view.base_loading(group.label, group.dtype)
            case BaseLoaded():
                self._add_base(event)
                self._identities.setdefault(event.group, set()).add(event.identity)
                self._view.base_loaded(event.facts, event.seconds)
            case MergeStarted():
                self._catch_up()
                entry = self._entries[event.task]
                position, total = len(self._reports) + 1, len(self._entries)
                self._view.adapter_started(entry.prepared.spec.name, position, total, entry.dtype)
            case MergeProgressed():
                self._catch_up()
                self._view.adapter_progress(event.done, event.total, event.module)
            case Merged():
                self._unkept[event.task] = _base_report(event.evidence.base)
                self._settle(event.task, outcome.merged(self._entries[event.task], event.evidence))
            case Undecided():
                self._settle(event.task, outcome.undecided(self._entries[event.task], event.refusal))
            case Waiting():
                name = self._entries[event.task].prepared.spec.name
                spent, limit = words.duration(round(event.seconds)), words.duration(event.limit_s)
                self._view.note(f"{name}: nothing heard of it for {spent}; its time limit is {limit}")
            case Idle() | Finished():
                self._catch_up(at_once=True)
            case _:
                assert_never(event)

    def _know_worker(self, event: DeviceChosen) -> None:
        if event.sandbox.missing and not self._environment.sandbox.missing:
            self._view.note(f"the worker's sandbox is not whole: {'; '.join(event.sandbox.missing)}")
        self._keeper.device_chosen(event)
        self._environment = replace(
            self._environment, device=event.device, device_name=event.device_name, sandbox=event.sandbox
        )

    def _add_base(self, event: BaseLoaded) -> None:
        """A base is listed once for each class that it was loaded as: one without a head has fewer parameters."""
        self._use(self._groups[event.group].directory, _base_report(event.facts), event.task)

    def _use(self, directory: str, base: BaseReport, index: int) -> None:
        position = self._position(index)
        self._bases[directory, base] = min(position, self._bases.get((directory, base), position))

    def _position(self, index: int) -> int:
        """Where an entry stands in the whole run's list."""
        return self._shard.positions[index] if self._shard is not None else index

    def _settle(self, index: int, report: AdapterReport) -> None:
        """One entry has been judged: its line of the report, on disk and before the reader's eyes."""
        self._reports[index] = report
        self._writer.changed()
        self._catch_up()
        self._view.adapter_done(report)

    def _take_over(self, index: int, line: Line) -> None:
        """An earlier run has judged this entry."""
        self._environment = replace(self._environment, device=self._keeper.device, device_name=self._keeper.device_name)
        self._taken_over.add(index)
        self._use(self._base_directory(index), line.base, index)
        self._reports[index] = line.adapter
        self._writer.changed()
        self._view.adapter_done(line.adapter)

    def _keep(self) -> None:
        """Keep what was judged, as soon as it is known of which bytes: the digests of bases come late."""
        for index in list(self._unkept):
            directory = self._base_directory(index)
            if self._digests.of(directory) is None:
                continue
            base = self._unkept.pop(index)
            if all(self._digests.is_of(directory, one) for one in self._identities.get(self._group_of[index], ())):
                line = self._keeper.keep(self._entries[index], Line(adapter=self._reports[index], base=base))
                self._reports[index] = line.adapter if line is not None else self._reports[index]

    def _base_directory(self, index: int) -> str:
        base = self._entries[index].prepared.base
        assert base is not None  # noqa: S101 - what has none is settled before
        return base.directory

    def _catch_up(self, *, at_once: bool = False) -> None:
        self._keep()
        if self._hourly.is_due:
            failed = sum(one.verdict is Verdict.FAILED for one in self._reports.values())
            self._view.note(self._hourly.said(len(self._reports), len(self._entries), failed))
        self._writer.catch_up(self._report, at_once=at_once)

    def _finish(self) -> Report:
        self._digests.wait()
        self._keep()
        self._distrust_changed_bases()
        report = self._report(complete=True)
        try:
            self._writer.write_last(report)
        except GateError:
            self._view.finish(report, "")  # the terminal is all that is left
            raise
        self._finished = True
        self._view.finish(report, self._output or "")
        return report

    def _distrust_changed_bases(self) -> None:
        """What was measured on a base counts only if all of it, and its digest, is of the same files."""
        for position, identities in self._identities.items():
            group = self._groups[position]
            if not all(self._digests.is_of(group.directory, identity) for identity in identities):
                self._withdraw(group.label, [task.index for task in group.tasks])
        for directory in {self._base_directory(index) for index in self._taken_over}:
            if not self._digests.holds(directory):
                taken = [index for index in self._taken_over if self._base_directory(index) == directory]
                self._withdraw(self._reports[taken[0]].base.model or "", taken)

    def _withdraw(self, label: str, indices: list[int]) -> None:
        error = base_changed(label)
        refusal = Refusal(check=None, message=error.message, hint=error.hint, origin=Origin.BASE)
        for index in indices:
            self._reports[index] = outcome.withdrawn(self._entries[index], refusal)
        self._view.note(f"{error.message}; the verdicts on it are withdrawn")

    def _report(self, *, complete: bool = False) -> Report:
        bases = in_order(
            Used(base=replace(base, sha256=self._digests.of(directory)), position=position)
            for (directory, base), position in self._bases.items()
        )
        adapters = tuple(self._reports[index] for index in sorted(self._reports))
        adapters, baseline = accept(adapters, self._config.baseline, self._today)
        shard = self._shard and replace(self._shard, bases_from=tuple(one.position for one in bases))
        return Report(
            complete=complete,
            tool_version=__version__,
            environment=self._environment,
            config_path=self._config.path,
            config_sha256=self._config.sha256,
            bases=tuple(one.base for one in bases),
            adapters=adapters,
            shard=shard,
            baseline=baseline,
        )


def _base_report(facts: BaseFacts) -> BaseReport:
    return BaseReport(
        model=facts.model,
        revision=facts.revision,
        dtype=facts.dtype,
        quantization=facts.quantization,
        parameters=facts.parameters,
        loaded_as=facts.loaded_as,
        replaced=facts.replaced,
        findings=bounded(findings_of_base(facts)),
    )


def _environment(device: str) -> Environment:
    return Environment(
        python=platform.python_version(),
        torch=_version("torch"),
        peft=_version("peft"),
        transformers=_version("transformers"),
        bitsandbytes=_version("bitsandbytes"),
        device=device,
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
