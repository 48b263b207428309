"""The whole flow of a run on one page: from a `Config` to a `Report`.

In: a valid configuration, the run's options, and a view. Out: a report. It is on disk from the start, as a provisional
one, so that a killed run leaves a true report. This module imports no torch: only the worker process does.

1. Resolve names to directories, and judge the adapters' files.       files/resolve.py, judging/adapter_report.py
2. Let features report entries that need no merge.                    run/feature.py
3. Group the rest by base.                                            run/groups.py
4. Merge in the worker, and judge the evidence of each adapter.       worker/supervisor.py, run/verdicts.py
5. Withdraw the verdicts on bases that changed, and write the report. files/base_watch.py, run/tally.py
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, assert_never

from merge_gate._internal.errors import GateError, UsageError
from merge_gate._internal.text import counted
from merge_gate.files.base_watch import BaseWatch, base_directory
from merge_gate.files.resolve import Fetching, Inputs
from merge_gate.judging import adapter_report
from merge_gate.judging.bounds import cut
from merge_gate.records.config import Config
from merge_gate.records.features import part
from merge_gate.records.files import Entry, Fetched
from merge_gate.records.options import RunOptions
from merge_gate.records.refusals import NotJudged
from merge_gate.records.report import Report
from merge_gate.report.stored.output_directory import begun_run, refuse_input
from merge_gate.report.wording import words
from merge_gate.report.wording.untrusted import one_line
from merge_gate.run.feature import Feature, requested
from merge_gate.run.groups import group_by_base, headers_timeout_s, placed, with_models
from merge_gate.run.selection import inputs_of, select
from merge_gate.run.tally import ReportWriter, Tally
from merge_gate.run.verdict_key import device_name
from merge_gate.run.verdicts import Verdicts, senseless
from merge_gate.run.view import View
from merge_gate.worker import protocol
from merge_gate.worker.device import has_card, why_no_card
from merge_gate.worker.protocol import Event, Group, Job
from merge_gate.worker.supervisor import WorkerSlot, supervise


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


class Run:
    """One run: its stages, and what it shows of the worker's events.

    Attributes:
        config, options: what the run is asked for.
        specs: the adapters of this run.
        inputs: the directories that it reads.
        features: what acts in the run, by name and in this order: the given features, or those that it asks for.
        tally: the entries, and the reports of those that are judged.
        groups: after stage 3, the entries that have to be merged.
    """

    def __init__(
        self,
        config: Config,
        options: RunOptions,
        view: View,
        worker: WorkerSlot | None = None,
        features: Mapping[str, Feature] | None = None,
    ) -> None:
        self.config, self.options, self.view = config, options, view
        self.specs, self.inputs = select(config, options.only), tuple(inputs_of(config))
        if options.output is not None:
            refuse_input(options.output, self.inputs)
        self.worker = worker or WorkerSlot()
        self.watch = BaseWatch(is_plan=options.is_plan)
        self.tally = Tally(config, device=options.device, watch=self.watch)
        self.writer = ReportWriter(None if options.is_plan else options.output, view)
        self.verdicts = Verdicts(self)
        self.groups: tuple[Group, ...] = ()
        self.features: dict[str, Feature] = {}
        try:
            for name, feature in features.items() if features is not None else requested(self):
                self.features[name] = feature
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release what features hold, also if one of them cannot, or a signal comes meanwhile."""
        with contextlib.ExitStack() as stack:
            for feature in self.features.values():
                stack.callback(feature.close)

    def run(self) -> Report:
        """Run all stages, and write the report."""
        for feature in self.features.values():
            if (report := feature.run_elsewhere()) is not None:
                return report
        with self.writer.guarding(self.report), self.worker:
            self._start_worker()
            merges = sum(len(spec.base.dtypes) for spec in self.specs)
            self.view.start(self.config.label, len(self.specs), merges)
            try:
                self.prepare()  # 1 to 3
            except UsageError as error:  # the run has begun, and a usage error would say that it has not
                raise GateError(error.message, hint=error.hint) from error
            self._merge()  # 4
            self._finish()  # 5
            try:
                return self.writer.finish(self.report(complete=True))
            except (GateError, OSError):  # of the disk
                raise
            except Exception as error:  # noqa: BLE001 - a worker may have sent what the report cannot show
                self.verdicts.refuse_unshowable(error)
                return self.writer.finish(self.report(complete=True))

    def prepare(self) -> None:
        """Stages 1 to 3."""
        to_merge = dict(self._judge_files())  # 1
        if not self.options.is_plan:
            self._refuse_other_bases(to_merge)
        for feature in self.features.values():  # 2
            feature.choose(to_merge)
        self._group(to_merge)  # 3

    def report(self, *, complete: bool = False) -> Report:
        """The report so far; `complete` at the end of the run."""
        report = self.tally.report(complete=complete)
        for feature in self.features.values():
            report = feature.add_to(report)
        return report

    def join_feature(self, name: str) -> Any:
        """A feature that the files of a base turn out to need."""
        if name not in self.features:
            self.features[name] = part(name, "feature").join(self)
        return self.features[name]

    def _start_worker(self) -> None:
        """Start the worker, which imports while the names become files.

        If a feature may decide every entry, a worker that was not started early waits for the first undecided entry. If
        pickles are allowed, it reads them, and this thread starts it: a worker ends with the thread that started it.
        """
        lost_adapters = dict(self.options.lost_adapters)
        is_needed = any(spec.name not in lost_adapters for spec in self.specs)
        may_wait = any(feature.may_decide_all for feature in self.features.values())
        if is_needed and (self.config.allow_pickle or self.worker.is_started or not may_wait):
            self.worker.start()

    # --- 1: files ----------------------------------------------------------------------------------------------------

    def fetching(self) -> Fetching:
        """How files are fetched."""
        how = Fetching(
            notify=self.view.note,
            lay_out=self._lay_out,
            is_plan=self.options.is_plan,
            read_pickle=None if self.options.is_plan else self.worker.read_pickle,
        )
        for feature in self.features.values():
            how = feature.fetch(how)
        return how

    def _lay_out(self, base: Fetched) -> str:
        directory: str = self.join_feature("stream").lay_out(base)
        return directory

    def _judge_files(self) -> Iterator[tuple[int, Entry]]:
        """Report the entries that their files alone decide, and yield the others: they have to be merged."""
        inputs = Inputs(self.config, self.fetching(), timeout_s=headers_timeout_s)
        lost_adapters = dict(self.options.lost_adapters)
        for spec in self.specs:
            self.tally.entries.extend(inputs.entries(spec))
        for index, entry in enumerate(self.tally.entries):
            report = adapter_report.blocked_report(entry)
            if report is None and (reason := lost_adapters.get(entry.spec.name)):
                hint = "check the node's log and its memory, and run the gate again"
                report = adapter_report.not_judged_report(entry, NotJudged(message=reason, hint=hint))
            if report is None:
                yield index, entry
                continue
            of_base = adapter_report.base_findings(entry)
            if of_base and entry.base is not None:
                unloaded = adapter_report.unloaded_base_report(report.base, of_base)
                self.tally.use(entry.base.directory, unloaded, index)
            self.verdicts.report(index, report)

    def _refuse_other_bases(self, to_merge: dict[int, Entry]) -> None:
        """Report the entries whose base is not the pinned one, before anything is merged.

        A base in a directory is hashed first, once in a run. A streamed base has the digests that the Hub lists, with
        which its bytes are compared when they pass.
        """
        pinned = {index: entry for index, entry in to_merge.items() if entry.spec.base.sha256}
        hashes_again = any(feature.hashes_again for feature in self.features.values())
        for entry in (to_merge if hashes_again else pinned).values():
            self.watch.hash_again(base_directory(entry))
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
                self.verdicts.report(index, report)

    # --- 3 and 4: the merge ------------------------------------------------------------------------------------------

    def _group(self, to_merge: dict[int, Entry]) -> None:
        grouped = group_by_base(to_merge.items())
        groups: Iterable[Group] = [placed(group, self.view.note) for group in grouped]
        for feature in self.features.values():
            groups = feature.schedule(tuple(groups))
        self.groups = tuple(with_models(group, self.tally.entries) for group in groups)
        if any(group.fed for group in self.groups):
            self.join_feature("stream")
        for group in self.groups:
            if not group.fed:
                self.watch.start(group.directory)

    def needs_merge(self, index: int) -> bool:
        """Whether a feature needs the merged tensors of an entry."""
        return any(feature.needs_merge(index) for feature in self.features.values())

    def _merge(self) -> None:
        self.verdicts.merging_begins()
        if not self.groups:
            self.worker.end()
        job = Job(
            groups=self.groups,
            device=self.options.device,
            allow_pickle=self.config.allow_pickle,
            trust_remote_code=self.config.trust_remote_code,
        )
        supervise(job, self._on_event, self.worker, [feature.service for feature in self.features.values()])

    def _on_event(self, event: Event) -> None:
        """Act on an event. The worker may be in the hands of a base's own code, so its evidence may make no sense."""
        try:
            self._act_on(event)
        except (GateError, OSError):  # of the disk or the terminal
            raise
        except Exception as error:  # of values that make no sense
            if not isinstance(event, protocol.Merged | protocol.Unjudged):
                raise  # it ends the worker
            self.verdicts.refuse(event.task, senseless(error))

    def _act_on(self, event: Event) -> None:  # noqa: C901, PLR0912 - a case for each event
        for feature in self.features.values():
            feature.received(event)
        match event:
            case protocol.DeviceChosen():
                self._note_device(event)
            case protocol.BaseLoading():
                group = self.groups[event.group]
                self.view.base_loading(group.base.name, group.base.dtype)
            case protocol.BaseLoaded():
                self._show_base(event)
            case protocol.BaseMeasured():
                group = self.groups[event.group]
                self.tally.use(group.directory, adapter_report.base_report(event.facts, group.files), event.task)
            case protocol.MergeStarted():
                self.verdicts.catch_up()
                entry = self.tally.entries[event.task]
                position, total = len(self.tally.reports) + 1, len(self.tally.entries)
                others = f" and {counted(len(event.others), 'other adapter')}" if event.others else ""
                self.view.adapter_started(entry.spec.name + others, position, total, entry.dtype)
            case protocol.MergeProgressed():
                self.verdicts.catch_up()
                self.view.adapter_progress(event.done, event.total, event.module)
            case protocol.ForwardRunning():
                self.verdicts.note_model(event)
            case protocol.Merged():
                self.verdicts.judge(event.task, event.evidence)
            case protocol.Unjudged():
                self.verdicts.refuse(event.task, event.refusal)
            case protocol.Idle():
                if event.timeout_s:
                    self.view.note(self._still_at(event))
                self.verdicts.catch_up(at_once=True)
            case protocol.InProgress() | protocol.Finished():
                pass  # for the supervisor; the last report follows
            case _:
                assert_never(event)

    def _note_device(self, event: protocol.DeviceChosen) -> None:
        if event.sandbox.missing and not self.tally.environment.sandbox.missing:
            missing = cut("; ".join(event.sandbox.missing))
            self.view.note(f"the worker's sandbox is incomplete: {missing}")
        if event.device == "cpu" and self.tally.environment.device == "auto" and has_card():
            self.view.note(f"the CPU merges: there is a GPU, but torch sees none; {why_no_card(os.environ)}")
        self.verdicts.device = device_name(event)
        self.tally.merged_on(event.device, event.device_name, event.sandbox)

    def _show_base(self, event: protocol.BaseLoaded) -> None:
        group = self.groups[event.group]
        if event.measured:
            self.tally.use(group.directory, adapter_report.base_report(event.facts, group.files), event.task)
        self.watch.loaded(group.directory, event.identity, (task.index for task in group.tasks))
        self.view.base_loaded(event.facts, event.seconds, measured=event.measured)
        if event.facts.no_skeleton:
            reason = one_line(event.facts.no_skeleton, 300)
            self.view.note(f"base {group.base.name} was loaded whole, by transformers itself: {reason}")

    def _still_at(self, event: protocol.Idle) -> str:
        spent, limit = words.duration(round(event.seconds)), words.duration(event.timeout_s)
        if event.task is None:
            return f"base {event.base}: still loading after {spent}; its time limit is {limit}"
        name = self.tally.entries[event.task].spec.name
        return f"{name}: no progress for {spent}; its time limit is {limit}"

    # --- 5: the end --------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        if self.watch.is_hashing or any(map(self.needs_merge, range(len(self.tally.entries)))):
            self.verdicts.catch_up(at_once=True)  # a large base may take minutes, and so may models
            self.watch.wait()
        for feature in self.features.values():
            feature.complete()
        self.verdicts.add_keys()
        self.verdicts.withdraw_void()
        for feature in self.features.values():
            feature.finish()
