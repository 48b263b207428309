"""The whole flow of a run on one page: from a `Config` to a `Report`.

In: a valid configuration, the run's options, and a view. Out: a report. It is on disk from the start, as a provisional
one, so that a killed run leaves a true report. This module imports no torch: only the worker process does.

1. Resolve names to directories, and judge the adapters' files.       files/resolve.py, judging/adapter_report.py
2. Let features report entries that need no merge.                    run/feature.py
3. Group the rest by base.                                            run/fed_bases.py
4. Merge in the worker, and judge the evidence of each adapter.       worker/supervisor.py, judging/adapter_report.py
5. Withdraw the verdicts on bases that changed, publish models, and write the report.
                                                                      files/base_watch.py, publish/publications.py
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import assert_never

from merge_gate._internal.errors import GateError, NotPublishedError, UsageError
from merge_gate._internal.output_files import PUBLISH_WITHIN
from merge_gate._internal.text import counted, listing, quoted
from merge_gate.features.publish import model_reports
from merge_gate.features.publish.manifest import PublicationFacts
from merge_gate.features.publish.one_publication import Publication
from merge_gate.features.publish.publications import Publications, unpublished_dtypes
from merge_gate.features.shards.partition import part_of
from merge_gate.files.base_watch import BaseWatch, base_directory
from merge_gate.files.preflight import base_of
from merge_gate.files.resolve import Fetching, Inputs
from merge_gate.judging import adapter_report
from merge_gate.names.suggestions import nearest
from merge_gate.records.config import AdapterSpec, Config, PublishSpec
from merge_gate.records.files import Entry
from merge_gate.records.measured import Evidence
from merge_gate.records.options import RunOptions
from merge_gate.records.refusals import NotJudged
from merge_gate.records.report import AdapterReport, BaseReport, Report
from merge_gate.records.terms import ForwardMode, Origin, Read, Verdict
from merge_gate.report.stored.output_directory import begun_run, refuse_input
from merge_gate.report.wording import words
from merge_gate.report.wording.untrusted import one_line
from merge_gate.run.feature import requested
from merge_gate.run.fed_bases import FedBases, group_by_base, headers_limit_s
from merge_gate.run.tally import ReportWriter, Tally
from merge_gate.run.verdict_key import device_name, keyed
from merge_gate.run.view import HourlyLog, View
from merge_gate.worker import protocol
from merge_gate.worker.device import has_card, why_no_card
from merge_gate.worker.pinned import base_changed, base_silent
from merge_gate.worker.protocol import ConsumerSpec, Event, Group, Job
from merge_gate.worker.supervisor import WorkerSlot, supervise

_PARTLY_READ = "only what adapters touch is read of the base, so it is run only with forward: required"


def run_gate(
    config: Config,
    options: RunOptions = RunOptions(),  # noqa: B008 - it is frozen
    *,
    view: View | None = None,
    worker: WorkerSlot | None = None,
    begins: Callable[[], object] = lambda: None,
) -> Report:
    """Gate the adapters of a configuration.

    Args:
        config: The adapters, their bases, and their checks.
        options: What the run is asked for. By default every element of every touched tensor is merged and measured.
        view: Shows progress and the result. None shows nothing.
        worker: May hold a process that was started before the configuration was read.
        begins: Called when no usage error can follow.

    Raises:
        UsageError: `only` names an adapter that the config does not list, or a directory cannot be used.
        GateError: the report cannot be written, or what is asked for does not fit the files of a base.
    """
    with contextlib.closing(Run(config, options, view or View(), worker)) as run, begun_run(options.output, begins):
        return run.run()


def planned_run(config: Config, options: RunOptions, view: View) -> Run:
    """A run that stopped after stage 3. It writes nothing, except small files of the Hub to the Hub's cache.

    It hashes no base. So it compares no pins, and reuses verdicts only on bases whose digests are known.

    Raises:
        UsageError: as `run_gate`.
    """
    options = replace(options, is_plan=True)
    with contextlib.closing(Run(config, options, view)) as run:
        run.prepare()
    return run


def _publish_spec(config: Config, specs: tuple[AdapterSpec, ...]) -> PublishSpec | None:
    """Where models are published."""
    if config.publish is not None and any(spec.base.read is Read.TOUCHED for spec in specs):
        raise UsageError(
            "a published model has every tensor of its base, and --read touched reads some", hint="set read: auto"
        )
    return config.publish


def _inputs(config: Config) -> Iterator[tuple[str, str]]:
    for spec in config.adapters:
        if spec.path:
            yield spec.path, f"the adapter {quoted(spec.name, 200)}"
        if spec.base.model:
            yield spec.base.model, f"the base {quoted(spec.base.label or spec.base.model, 200)}"
        elif spec.path and (named := base_of(spec.path)):
            yield str(Path(config.directory, named)), f"the base {quoted(named, 200)}"


def check_files(config: Config, *, view: View | None = None, only: tuple[str, ...] = ()) -> Iterator[AdapterReport]:
    """Judge the files of the adapters, and of bases that are local directories, without torch."""
    specs = select(config, only)
    inputs = Inputs(config, Fetching(notify=(view or View()).note), limit_s=headers_limit_s)
    return (adapter_report.files_report(inputs.checked(spec)) for spec in specs)


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
        raise UsageError(f"--only {unknown[0]}: {config.label} lists no such adapter", hint=hint)
    return tuple(spec for spec in config.adapters if not only or spec.name in only)


class Run:
    """One run: its stages, and what it does on each event of the worker.

    Attributes:
        options: what the run is asked for.
        specs: the adapters of this run.
        tally: the entries, and the reports of those that are judged.
        groups: after stage 3, the entries that have to be merged.
        publications: the models to publish.
    """

    def __init__(
        self,
        config: Config,
        options: RunOptions,
        view: View,
        worker: WorkerSlot | None = None,
        publications: Publications | None = None,
    ) -> None:
        specs = select(config, options.only)
        self.config, self.options, self.view = config, options, view
        self.inputs = tuple(_inputs(config))
        if options.output is not None:
            refuse_input(options.output, self.inputs)
        wanted = _publish_spec(config, specs)
        self.specs, shard = part_of(config, specs, options)
        within = os.environ.get(PUBLISH_WITHIN)
        self.publications = publications or Publications(
            wanted, self.specs, inputs=self.inputs, within=within, notify=view.note, is_plan=options.is_plan
        )
        self.watch = BaseWatch(is_plan=options.is_plan)
        self.features = list(requested(self))
        self.tally = Tally(config, shard, device=options.device, watch=self.watch)
        self._without_key: dict[int, tuple[AdapterReport, BaseReport]] = {}
        self._device = ""
        self._running: set[int] = set()  # tasks whose models run, or whose process died meanwhile
        self._fed = FedBases(self.watch, view.note)
        self.worker = worker or WorkerSlot()
        how = Fetching(
            notify=view.note,
            lay_out=self._fed.lay_out,
            with_companions=wanted is not None,
            is_plan=options.is_plan,
            read_pickle=None if options.is_plan else self.worker.read_pickle,
        )
        self._inputs = Inputs(config, how, limit_s=headers_limit_s)
        self._given_up = dict(options.given_up)
        self._loaded: dict[int, BaseReport] = {}
        self.writer = ReportWriter(None if options.is_plan else options.output, view)
        self._hourly = HourlyLog()
        self.groups: tuple[Group, ...] = ()

    def close(self) -> None:
        """Release what features hold, and what is not published."""
        for feature in self.features:
            feature.close()
        self.publications.close()

    def prepare(self) -> None:
        """Stages 1 to 3."""
        to_merge = dict(self._judge_files())  # 1
        if not self.options.is_plan:
            self._refuse_other_bases(to_merge)
        published = self.publications.choose(to_merge)
        if published and not self.options.is_plan and (note := unpublished_dtypes(to_merge, published)):
            self.view.note(note)
        for feature in self.features:
            feature.choose(to_merge)  # 2
        self._group(to_merge, published)  # 3

    def run(self) -> Report:
        guarded = self.writer.guarding(self.tally.report)
        with guarded, contextlib.closing(self.publications), self._fed, self.worker:
            self._start_worker()
            merges = sum(len(spec.base.dtypes) for spec in self.specs)
            self.view.start(self.config.label, len(self.specs), merges)
            try:
                self.prepare()  # 1 to 3
            except UsageError as error:  # the run has begun, and a usage error would say that it has not
                raise GateError(error.message, hint=error.hint) from error
            self._merge()  # 4
            self._finish()  # 5
            return self.writer.finish(self.tally.report(complete=True))

    def _start_worker(self) -> None:
        """Start the worker, which imports while the names become files.

        If a feature may decide every entry, a worker that was not started early waits for the first one that it does
        not. If pickles are allowed, it reads them, and this thread starts it: a worker ends with the thread that
        started it.
        """
        is_needed = any(spec.name not in self._given_up for spec in self.specs)
        may_wait = any(feature.may_decide_all for feature in self.features)
        if is_needed and (self.config.allow_pickle or self.worker.is_started or not may_wait):
            self.worker.start()

    # --- 1: files ----------------------------------------------------------------------------------------------------

    def _judge_files(self) -> Iterator[tuple[int, Entry]]:
        """Report the entries that their files alone decide, and yield the others: they have to be merged."""
        for spec in self.specs:
            self.tally.entries.extend(self._inputs.entries(spec))
        for index, entry in enumerate(self.tally.entries):
            report = adapter_report.blocked_report(entry)
            if report is None and (reason := self._given_up.get(entry.spec.name)):
                hint = "check the node's log and its memory, and run the gate again"
                report = adapter_report.not_judged_report(entry, NotJudged(message=reason, hint=hint))
            if report is None:
                yield index, entry
                continue
            of_base = adapter_report.base_findings(entry)
            if of_base and entry.base is not None:
                unloaded = adapter_report.unloaded_base_report(report.base, of_base)
                self.tally.use(entry.base.directory, unloaded, index)
            self._report(index, report)

    def _refuse_other_bases(self, to_merge: dict[int, Entry]) -> None:
        """Report the entries whose base is not the pinned one, before anything is merged.

        A base in a directory is hashed first, once in a run. A streamed base has the digests that the Hub lists, with
        which its bytes are compared when they pass.
        """
        pinned = {index: entry for index, entry in to_merge.items() if entry.spec.base.sha256}
        for entry in (to_merge if self.publications.spec else pinned).values():
            self.watch.hash_anew(base_directory(entry))
        for entry in pinned.values():
            self.watch.start(base_directory(entry))
        if pinned:
            self.watch.wait()
        for index, entry in pinned.items():
            names = [name for name, _ in entry.spec.base.sha256]
            checked = adapter_report.with_base_digests(entry, self.watch.pinned(base_directory(entry), names))
            self.tally.entries[index] = to_merge[index] = checked
            report = adapter_report.blocked_report(checked) or adapter_report.other_base_report(checked)
            if report is not None:
                del to_merge[index]
                self._report(index, report)

    # --- 3 and 4: the merge ------------------------------------------------------------------------------------------

    def _group(self, to_merge: dict[int, Entry], published: Mapping[int, ConsumerSpec]) -> None:
        groups = []
        for group in group_by_base(to_merge.items(), publishes=published):
            read = self.read_of(group)
            for feature in self.features:
                group = feature.schedule(group, read)  # noqa: PLW2901
            groups.append(self._run_if_whole(self._fed.schedule(group, read)))
        self.groups = tuple(groups)
        self._hourly.merging_begins(len(self.tally.reports))

    def needs_merge(self, index: int) -> bool:
        """Whether an entry has to be merged, because its merged tensors are needed."""
        return index in self.publications.wanted

    def _run_if_whole(self, group: Group) -> Group:
        """Unless that is required, run no models if that would read more of a base than the merges do."""
        if not group.records or not group.in_passes:
            return group
        tasks = (
            task
            if self.tally.entries[task.index].spec.forward is ForwardMode.REQUIRED
            else task.without("forward", _PARTLY_READ)
            for task in group.tasks
        )
        return replace(group, tasks=tuple(tasks))

    def read_of(self, group: Group) -> Read:
        """How much of a group's base is read: as much as any of its adapters asks for, and all of it to publish."""
        if any(task.why_not("publish") == "" for task in group.tasks):
            return Read.WHOLE
        asked = {self.tally.entries[task.index].spec.base.read for task in group.tasks}
        return next((read for read in (Read.WHOLE, Read.TOUCHED) if read in asked), Read.AUTO)

    def _merge(self) -> None:
        if not self.groups:
            self.worker.end()
        job = Job(
            groups=self.groups,
            device=self.options.device,
            allow_pickle=self.config.allow_pickle,
            trust_remote_code=self.config.trust_remote_code,
        )
        supervise(job, self._on_event, self.worker, [self._fed.feeds.service, self.publications.service])

    def _on_event(self, event: Event) -> None:  # noqa: C901, PLR0912 - a case for each event
        for feature in self.features:
            feature.received(event)
        match event:
            case protocol.DeviceChosen():
                self._know_worker(event)
            case protocol.BaseLoading():
                group = self.groups[event.group]
                self.view.base_loading(group.base.name, group.base.dtype)
            case protocol.BaseLoaded():
                group = self.groups[event.group]
                if event.measured:
                    self.tally.use(group.directory, adapter_report.base_report(event.facts, group.files), event.task)
                self.watch.loaded(group.directory, event.identity, (task.index for task in group.tasks))
                self.view.base_loaded(event.facts, event.seconds, measured=event.measured)
                if event.facts.no_skeleton:
                    reason = one_line(event.facts.no_skeleton, 300)
                    self.view.note(f"base {group.base.name} was loaded whole, by transformers itself: {reason}")
            case protocol.BaseMeasured():
                group = self.groups[event.group]
                self.tally.use(group.directory, adapter_report.base_report(event.facts, group.files), event.task)
            case protocol.MergeStarted():
                self._catch_up()
                entry = self.tally.entries[event.task]
                position, total = len(self.tally.reports) + 1, len(self.tally.entries)
                others = f" and {counted(len(event.others), 'other adapter')}" if event.others else ""
                self.view.adapter_started(entry.spec.name + others, position, total, entry.dtype)
            case protocol.MergeProgressed():
                self._catch_up()
                self.view.adapter_progress(event.done, event.total, event.module)
            case protocol.ForwardRunning():
                (self._running.add if event.is_running else self._running.discard)(event.task)
            case protocol.Merged():
                self._judge(event.task, event.evidence)
            case protocol.Unjudged():
                self._report_not_judged(event)
            case protocol.Idle():
                if event.limit_s:
                    self.view.note(self._still_at(event))
                self._catch_up(at_once=True)
            case protocol.InProgress() | protocol.Finished():
                pass  # for the supervisor; the last report follows
            case _:
                assert_never(event)

    def _report_not_judged(self, event: protocol.Unjudged) -> None:
        entry = self.tally.entries[event.task]
        report = adapter_report.not_judged_report(entry, event.refusal)
        if refused := adapter_report.refused_base_report(report.base, event.refusal):  # the report lists this base too
            self.tally.use(base_directory(entry), refused, event.task)
        self.publications.discard(event.task)
        self._report(event.task, report)

    def _still_at(self, event: protocol.Idle) -> str:
        spent, limit = words.duration(round(event.seconds)), words.duration(event.limit_s)
        if event.task is None:
            return f"base {event.base}: still loading after {spent}; its time limit is {limit}"
        name = self.tally.entries[event.task].spec.name
        return f"{name}: no progress for {spent}; its time limit is {limit}"

    def _know_worker(self, event: protocol.DeviceChosen) -> None:
        if event.sandbox.missing and not self.tally.environment.sandbox.missing:
            self.view.note(f"the worker's sandbox is incomplete: {'; '.join(event.sandbox.missing)}")
        if event.device == "cpu" and self.tally.environment.device == "auto" and has_card():
            self.view.note(f"the CPU merges: there is a GPU, but torch sees none; {why_no_card(os.environ)}")
        self._device = device_name(event)
        self.tally.merged_on(event.device, event.device_name, event.sandbox)

    def _judge(self, index: int, evidence: Evidence) -> None:
        entry = self.tally.entries[index]
        directory = base_directory(entry)
        needs_all = evidence.base.record is None or entry.spec.base.sha256
        if needs_all and (unproven := self._fed.unproven(directory)) is not None:
            self._report_not_judged(protocol.Unjudged(task=index, refusal=unproven))
            return
        self.watch.start(directory)  # unless its bytes passed through this process
        report = adapter_report.merged_report(entry, evidence)
        base = adapter_report.base_report(evidence.base, entry.base_files)
        if self._group_of(index).plain_dtype is None and not (evidence.forward.missing or index in self._running):
            self._without_key[index] = report, base
        if report.verdict is Verdict.PASSED:
            self._loaded[index] = base
            self.publications.passed(index, evidence)
        else:
            self.publications.discard(index)
        self._report(index, report)

    def _report(self, index: int, report: AdapterReport) -> None:
        """Put the report of an entry into the run's report, and show it."""
        self.tally.set_report(index, report)
        self.writer.changed()
        self._catch_up()
        self.view.adapter_done(report)

    def _catch_up(self, *, at_once: bool = False) -> None:
        """Do what is due by now: give verdicts their keys, write a line of the log, write a provisional report."""
        self._add_keys()
        if self._hourly.is_due:
            reports = self.tally.reports
            failed = sum(report.verdict is Verdict.FAILED for report in reports.values())
            self.view.note(self._hourly.line(len(reports), len(self.tally.entries), failed))
        self.writer.catch_up(self.tally.report, at_once=at_once)

    def _add_keys(self) -> None:
        """Add the keys of verdicts on bases whose digests are known by now; a digest may take longer than a merge."""
        for index, (judged, base) in list(self._without_key.items()):
            entry = self.tally.entries[index]
            directory = base_directory(entry)
            if self.watch.digest(directory) is None:
                continue
            del self._without_key[index]
            content = self.watch.content(directory) if self.watch.is_unchanged(index) else None
            made = keyed(entry, judged, content, self._device, self.config.trusts) if content is not None else None
            if made is not None:
                self.tally.set_report(index, made[0])
                for feature in self.features:
                    feature.decided(made[0], base, made[1])

    def _group_of(self, index: int) -> Group:
        return next(group for group in self.groups if any(task.index == index for task in group.tasks))

    # --- 5: the report -----------------------------------------------------------------------------------------------

    def _withdraw_void(self) -> None:
        """Replace the verdicts on bases that changed during the run. An entry without a verdict keeps its reason."""
        for directory, indices in self.watch.void().items():
            reports = self.tally.reports
            judged = [index for index in indices if index in reports and reports[index].verdict is not Verdict.ERROR]
            if not judged:
                continue
            base = self.tally.entries[judged[0]].base
            reason = base_silent if self.watch.is_silent(directory) else base_changed
            error = reason(base.name if base is not None else "")
            refusal = NotJudged(message=error.message, hint=error.hint, origin=Origin.BASE)
            for index in judged:
                self.tally.set_report(index, adapter_report.withdrawn_report(self.tally.entries[index], refusal))
            self.view.note(f"{error.message}; the verdicts on it are withdrawn")

    def _publish(self) -> None:
        """Give the models of adapters that passed their names. The weights of their bases are no longer read."""
        for index in self.publications.wanted:
            report = self.tally.reports.get(index)
            if report is None or report.verdict is not Verdict.PASSED:
                self.publications.discard(index)
                continue
            try:
                published, findings = self.publications.publish(index, partial(self._facts, index))
            except NotPublishedError as error:
                self.tally.set_report(index, model_reports.unpublished_report(report, error.message, error.hint))
                self.view.note(f"{report.name}: not published: {error.message}")
            else:
                self.tally.set_report(index, model_reports.published_report(report, published, findings))
                self.view.note(f"{report.name}: published to {published.directory}")
        self._warn_of_earlier_models()

    def _warn_of_earlier_models(self) -> None:
        """Name the models of earlier runs that adapters still have which have no new one."""
        reports = {index: self.tally.reports.get(index) for index in range(len(self.tally.entries))}
        judged = {index: report for index, report in reports.items() if report is not None}
        published = {report.name for report in judged.values() if report.published is not None}
        for name, directory in self.publications.earlier(published):
            own = [(index, report) for index, report in judged.items() if report.name == name]
            index, report = min(own, key=lambda pair: pair[1].verdict is Verdict.PASSED)
            warned = model_reports.report_with_earlier_model(report, directory)
            self.tally.set_report(index, warned)
            self.view.note(f"warning: {name}: {warned.findings[-1].message}")

    def _facts(self, index: int, model: Publication) -> PublicationFacts:
        entry, report = self.tally.entries[index], self.tally.reports.get(index)
        directory = base_directory(entry)
        if report is None or index not in self._loaded or not self.watch.is_unchanged(index):
            raise NotPublishedError(
                "the digest of the base's files is not known",
                hint="let nothing write to the base during the run, and run the gate again",
            )
        return PublicationFacts(
            entry=entry,
            report=report,
            base=replace(self._loaded[index], sha256=self.watch.digest(directory), files=self.watch.files(directory)),
            base_identity=self.watch.identity(directory),
            environment=self.tally.environment,
            config=self.config,
            spec=model.spec,
            tensors=model.tensors,
            base_tensors=model.base_tensors,
            settings=model.settings,
        )

    def _finish(self) -> None:
        if self.watch.is_hashing or self.publications.wanted:
            self._catch_up(at_once=True)  # a large base may take minutes, and so may models
            self.watch.wait()
        self.publications.complete()
        self._add_keys()
        self._withdraw_void()
        self._publish()
        for feature in self.features:
            feature.finish()
