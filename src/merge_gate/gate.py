"""Config → Report, the whole flow on one page.

In: a valid `Config`, a device, an output directory, a view. Out: a `Report`, on disk from the start (provisional) and
as adapters are judged, so that a run that is killed leaves a true one. Imports no torch: the worker process runs what
measures.

1. Names become directories, and the adapters' files are judged on their own.   sources/inputs.py, judging/outcome.py
2. What is left is grouped by base, dtype and quantisation.                     engine/grouping.py
3. A worker merges; each evidence becomes findings, a verdict and a report.     engine/supervisor.py, judging/outcome.py
"""

from __future__ import annotations

import contextlib
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
from merge_gate.fleet.partition import part_of
from merge_gate.judging import outcome
from merge_gate.judging.bounds import bounded
from merge_gate.judging.finite import findings_of_base
from merge_gate.records.config import AdapterSpec, Config
from merge_gate.records.files import Entry, FileIdentity
from merge_gate.records.measured import Refusal
from merge_gate.records.report import AdapterReport, BaseReport, Environment, Report, Shard
from merge_gate.records.terms import Origin, Quantization
from merge_gate.report import words
from merge_gate.report.provisional import ReportWriter
from merge_gate.report.terminal import SilentView
from merge_gate.sources.base_digests import BaseDigests
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
) -> Report:
    """Gate every adapter of the config (with `only`: those named; with `shard`, (I, N): the I-th of N parts of them).

    Every element of every touched tensor is merged and measured. With `quick`, a bound may stand for the merge of a
    weight where it proves every value finite and small (engine/bound.py).

    Raises:
        UsageError: `only` names an adapter that the config does not list, or the output cannot be written.
    """
    specs, part = select(config, only), None
    if shard is not None:
        specs, part = part_of(config, specs, *shard, quick=quick)
    run = _Run(config, specs, part, device=device, output=output, view=view or SilentView())
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
        *,
        device: str,
        output: str | None,
        view: View,
    ) -> None:
        self._config, self._specs, self._device, self._output, self._view = config, specs, device, output, view
        self._shard = shard
        self._writer = ReportWriter(output, view.note)
        self._digests = BaseDigests()
        self._environment = _environment(device)
        self._entries: list[Entry] = []
        self._groups: tuple[Group, ...] = ()
        self._bases: list[tuple[int, Used]] = []
        self._identities: dict[int, set[tuple[FileIdentity, ...]]] = {}
        self._reports: dict[int, AdapterReport] = {}
        self._finished = False

    def run(self, *, quick: bool) -> Report:
        self._writer.write_first(self._report())
        try:
            quantizes = any(spec.base.quantization is not Quantization.NONE for spec in self._specs)
            worker = WorkerProcess(quantizes=quantizes) if self._specs else contextlib.nullcontext()
            with worker as child:  # it imports while the names become files
                self._view.start(self._config.path, sum(len(spec.base.dtypes) for spec in self._specs))
                self._prepare(quick=quick)
                supervise(self._job(), self._on_event, child)
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
        self._groups = group_by_base(to_merge, quick=quick)
        free_bytes = MemoryGroup().free_bytes()
        for group in self._groups:
            self._digests.start(group.directory)
            if said := too_large(group.label, group.directory, free_bytes):
                self._view.note(said)
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
        self._environment = replace(
            self._environment, device=event.device, device_name=event.device_name, sandbox=event.sandbox
        )

    def _add_base(self, event: BaseLoaded) -> None:
        """A base is listed once for each class that it was loaded as: one without a head has fewer parameters."""
        facts = event.facts
        base = BaseReport(
            model=facts.model,
            revision=facts.revision,
            dtype=facts.dtype,
            quantization=facts.quantization,
            parameters=facts.parameters,
            loaded_as=facts.loaded_as,
            replaced=facts.replaced,
            findings=bounded(findings_of_base(facts)),
        )
        if base not in (known.base for _, known in self._bases):
            self._bases.append((event.group, Used(base=base, position=self._position(event.task))))

    def _position(self, index: int) -> int:
        """Where an entry stands in the whole run's list."""
        return self._shard.positions[index] if self._shard is not None else index

    def _settle(self, index: int, report: AdapterReport) -> None:
        """One entry has been judged: its line of the report, on disk and before the reader's eyes."""
        self._reports[index] = report
        self._writer.changed()
        self._catch_up()
        self._view.adapter_done(report)

    def _catch_up(self, *, at_once: bool = False) -> None:
        self._writer.catch_up(self._report, at_once=at_once)

    def _finish(self) -> Report:
        self._digests.wait()
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
            if all(self._digests.is_of(group.directory, identity) for identity in identities):
                continue
            error = base_changed(group.label)
            refusal = Refusal(check=None, message=error.message, hint=error.hint, origin=Origin.BASE)
            for task in group.tasks:
                self._reports[task.index] = outcome.withdrawn(self._entries[task.index], refusal)
            self._view.note(f"{error.message}; the verdicts on it are withdrawn")

    def _report(self, *, complete: bool = False) -> Report:
        bases = in_order(
            replace(one, base=replace(one.base, sha256=self._digests.of(self._groups[group].directory)))
            for group, one in self._bases
        )
        shard = self._shard and replace(self._shard, bases_from=tuple(one.position for one in bases))
        return Report(
            complete=complete,
            tool_version=__version__,
            environment=self._environment,
            config_path=self._config.path,
            config_sha256=self._config.sha256,
            bases=tuple(one.base for one in bases),
            adapters=tuple(self._reports[index] for index in sorted(self._reports)),
            shard=shard,
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
