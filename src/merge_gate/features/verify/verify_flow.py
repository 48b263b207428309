"""The whole flow of `merge-gate verify` on one page: a finished directory and the names of base and adapter ▶ `Report`.

In: what the command line asks for, and a view. Out: a report with one entry, which is about the directory. Imports no
torch: only the worker process does.

1. Resolve the names, and read the headers of the directory.          files/resolve.py
2. Merge the adapter and each candidate, and compare each merge.      worker/supervisor.py, finished_model.py
3. Name the kind of the directory.                                    verify/
4. Write the report.                                                  run/tally.py
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from merge_gate._internal.errors import GateError, ResolveError, UsageError
from merge_gate._internal.text import quoted
from merge_gate.config.paths import resolve_argument
from merge_gate.features.verify import answer
from merge_gate.features.verify.directory import settings_files
from merge_gate.files import resolve
from merge_gate.files.base_watch import BaseWatch
from merge_gate.files.identity import directory_identity
from merge_gate.files.resolve import Fetching, Inputs
from merge_gate.judging import adapter_report
from merge_gate.judging.not_judged import not_judged
from merge_gate.limits.time_limit import ANSWER_LIMIT_S, within
from merge_gate.names.hub_names import HUB, close_directory
from merge_gate.records.comparison import Comparison, SettingsFiles
from merge_gate.records.config import Config
from merge_gate.records.files import MANIFEST_NAME, Entry, FileIdentity, Snapshot
from merge_gate.records.measured import Evidence
from merge_gate.records.refusals import NotJudged
from merge_gate.records.report import AdapterReport, Report
from merge_gate.records.terms import Access, BaseKey, Origin, Quantization, Read
from merge_gate.report.stored.output_directory import begun_run
from merge_gate.run.fed_bases import FedBases, group_by_base, headers_limit_s
from merge_gate.run.tally import ReportWriter, Tally
from merge_gate.run.view import View
from merge_gate.worker import protocol
from merge_gate.worker.pinned import base_changed, base_silent
from merge_gate.worker.protocol import ALONE, ConsumerSpec, Event, Group, Job
from merge_gate.worker.supervisor import WorkerSlot, supervise

DEVICE = "cpu"
"""Other devices may round otherwise."""

_NO_FORWARD = "merge-gate verify compares values, and runs no model"


def verify_record(
    merged: str,
    *,
    view: View,
    allowed: tuple[str, ...] = (),
    output: str | None = None,
) -> Report:
    """Compare a published directory with its own merge-gate.json. Nothing is merged.

    Raises:
        UsageError: there is no such directory, or it has no merge-gate.json of merge-gate.
        GateError: a file cannot be read, or the report cannot be written.
    """
    _refuse_inside(merged, output)
    name, path, _ = resolve_argument(merged, is_base=True)
    before = _identity(path or "")
    if path is None:
        raise UsageError(
            f"{quoted(name, 200)} is not a directory here", hint="give --adapter to compare a model on the Hub"
        )
    try:
        found = answer.recorded_report(name, name, allowed)
        sha256 = resolve.digest_file(Path(name, MANIFEST_NAME))
    except OSError as error:
        raise GateError(f"{quoted(name, 200)} cannot be read: {error.strerror or error}") from error
    found = _unless_swapped(found, Snapshot(name=name, directory=name), before)
    config = Config(path=None, directory=str(Path.cwd()), sha256=sha256, adapters=())
    tally = Tally(config, None, device=DEVICE, watch=BaseWatch())
    tally.set_report(0, found)
    with begun_run(output):
        return ReportWriter(output, view).finish(replace(tally.report(complete=True), is_comparison=True))


class Verification:
    """Compares a finished model with the merge of the first adapter of `config`. The others are candidates.

    Args:
        config: the adapters, on one base.
        merged: the directory or Hub id of the finished model.
        allowed: kinds that do not fail it.
        output: the directory that the reports go to; None writes none.
        view: shows the progress.
        worker: may hold a process that was started before.
    """

    def __init__(
        self,
        config: Config,
        merged: str,
        *,
        view: View,
        worker: WorkerSlot,
        allowed: tuple[str, ...] = (),
        output: str | None = None,
    ) -> None:
        self._config, self._name, self._allowed, self._output = config, merged, allowed, output
        self._view, self._worker = view, worker
        self._watch = BaseWatch()
        self._tally = Tally(config, None, device=DEVICE, watch=self._watch)
        self._fed = FedBases(self._watch, view.note)
        self._how = Fetching(notify=view.note, lay_out=self._fed.lay_out, with_companions=True, with_copies=True)
        self._writer = ReportWriter(output, view)
        self._groups: tuple[Group, ...] = ()
        self._comparisons: dict[int, Comparison] = {}
        self._evidence: dict[int, Evidence] = {}
        self._refusals: dict[int, protocol.Unjudged] = {}
        self._entries: list[Entry] = []

    def run(self) -> Report:
        """Compare, and write the report.

        Raises:
            UsageError: there is no such directory, or the output directory cannot be used.
            GateError: the report cannot be written.
        """
        _refuse_inside(self._name, self._output)
        with self._fed, self._worker:
            before = _identity(self._name)
            merged = self._merged()
            if before is None and isinstance(merged, Snapshot):  # a model on the Hub
                before = _identity(merged.directory)
            with begun_run(self._output):
                self._writer.write_first(replace(self._tally.report(), is_comparison=True))
                self._view.start_comparison(self._name)
                report = self._judged(merged)
                self._watch.wait()
                report = self._unless_changed(report)
                if isinstance(merged, Snapshot):
                    report = _unless_swapped(report, merged, before)
                self._view.adapter_done(report)
                self._tally.set_report(0, report)
                return self._writer.finish(replace(self._tally.report(complete=True), is_comparison=True))

    # --- 1. ----------------------------------------------------------------------------------------------------------

    def _merged(self) -> Snapshot | ResolveError:
        """The finished directory, or why its files cannot be read as a model's."""
        label, path, hub_id = resolve_argument(self._name, is_base=True)
        if hub_id == self._name and (close := close_directory(hub_id, Path.cwd(), is_base=False)):
            hint = f"did you mean {quoted(close, 200)}? If it is on the Hub, write {quoted(HUB + hub_id, 200)}"
            raise UsageError(f"no such directory: {quoted(hub_id, 200)}", hint=hint)
        try:
            how = replace(self._how, access=Access.STREAM)
            return resolve.resolve_base(path or hub_id or label, None, how, label=label)
        except ResolveError as error:
            if path is not None or error.check is not None:
                return error
            raise

    # --- 2. ----------------------------------------------------------------------------------------------------------

    def _judged(self, merged: Snapshot | ResolveError) -> AdapterReport:
        inputs = Inputs(self._config, self._how, limit_s=headers_limit_s)
        self._entries = [inputs.prepare(spec) for spec in self._config.adapters]
        entry = self._entries[0]
        blocked = adapter_report.blocked_report(entry)
        if isinstance(merged, ResolveError):
            snapshot = Snapshot(name=self._name, directory=self._name)
            return answer.unread_report(snapshot, entry, merged)
        if blocked is not None:
            return answer.without_merge(merged, blocked)
        if (decided := answer.before_merge(merged, entry)) is not None:
            return decided
        self._merge(merged)
        if (undecided := self._refusals.get(0)) is not None:
            return answer.without_merge(merged, adapter_report.not_judged_report(entry, undecided.refusal))
        comparison = self._comparisons.get(0, Comparison())  # 3.
        candidates = {self._entries[index].spec.source: one for index, one in self._comparisons.items() if index > 0}
        findings = answer.findings_of(merged, entry, comparison, candidates)
        return answer.compared_report(merged, entry, self._evidence[0], findings, self._allowed)

    def _merge(self, merged: Snapshot) -> None:
        mergeable = [
            (index, one) for index, one in enumerate(self._entries) if adapter_report.blocked_report(one) is None
        ]
        groups = group_by_base(mergeable)
        settings, files = settings_files(merged, self._entries[0]), merged.base_files
        assert files is not None  # noqa: S101 - it was resolved as a base
        self._groups = tuple(self._fed.schedule(_comparing(group, merged, settings), Read.WHOLE) for group in groups)
        key = BaseKey(model=merged.name, revision=merged.revision, dtype="auto", quantization=Quantization.NONE)
        finished = Group(base=key, directory=merged.directory, files=files, fed=True, tasks=())
        job = Job(
            groups=(*self._groups, finished),
            device=DEVICE,
            allow_pickle=self._config.allow_pickle,
            trust_remote_code=self._config.trust_remote_code,
        )
        supervise(job, self._on_event, self._worker, [self._fed.feeds.service])

    def _on_event(self, event: Event) -> None:
        match event:
            case protocol.DeviceChosen():
                self._tally.merged_on(event.device, event.device_name, event.sandbox)
            case protocol.BaseLoading():
                base = self._groups[event.group].base
                self._view.base_loading(base.name, base.dtype)
            case protocol.BaseLoaded():
                directory = self._groups[event.group].directory
                self._watch.loaded(directory, event.identity, (task.index for task in self._groups[event.group].tasks))
                self._view.base_loaded(event.facts, event.seconds, measured=event.measured)
            case protocol.MergeStarted():
                self._view.adapter_started(self._entries[event.task].spec.name, 1, 1, self._entries[event.task].dtype)
            case protocol.MergeProgressed():
                self._view.adapter_progress(event.done, event.total, event.module)
            case protocol.Merged():
                self._merged_one(event)
            case protocol.Unjudged():
                self._refusals[event.task] = event
            case _:
                pass

    def _merged_one(self, event: protocol.Merged) -> None:
        comparison = event.evidence.facts.get("verify")
        if isinstance(comparison, Comparison):
            self._comparisons[event.task] = comparison
        entry = self._entries[event.task]
        directory = entry.base.directory if entry.base is not None else ""
        if event.evidence.base.record is None and (unproven := self._fed.unproven(directory)) is not None:
            self._refusals[event.task] = protocol.Unjudged(task=event.task, refusal=unproven)
            return
        self._evidence[event.task] = event.evidence
        self._watch.start(directory)
        self._tally.use(directory, adapter_report.base_report(event.evidence.base, entry.base_files), event.task)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _unless_changed(self, report: AdapterReport) -> AdapterReport:
        """The report, or an error if the base was written to meanwhile."""
        if not any(0 in indices for indices in self._watch.void().values()):
            return report
        entry = self._entries[0]
        is_silent = entry.base is not None and self._watch.is_silent(entry.base.directory)
        reason = base_silent if is_silent else base_changed
        error = reason(entry.base.name if entry.base is not None else "")
        refusal = NotJudged(message=error.message, hint=error.hint, origin=Origin.BASE)
        withdrawn = adapter_report.withdrawn_report(entry, refusal)
        return replace(withdrawn, name=report.name, source=report.source, compared_with=report.compared_with)


def _refuse_inside(merged: str, output: str | None) -> None:
    """Refuse to write the report into the directory that it is about: it would be one of the files."""
    if output is not None and Path(os.path.realpath(output)).is_relative_to(os.path.realpath(merged)):
        raise UsageError(
            f"--output leads into {quoted(merged, 200)}: the report would be among the files of the model",
            hint="choose a directory outside of the model with --output",
        )


def _identity(directory: str) -> tuple[FileIdentity, ...] | None:
    """The identity of a directory and everything in it; None if it cannot be read, or its mount does not answer."""
    try:
        return within(ANSWER_LIMIT_S, lambda: directory_identity(directory))
    except (OSError, ValueError):
        return None


def _unless_swapped(report: AdapterReport, merged: Snapshot, before: tuple[FileIdentity, ...] | None) -> AdapterReport:
    """The report, or an error if something in the finished directory was replaced or written to meanwhile."""
    now = _identity(merged.directory)
    if before is not None and now == before:
        return report
    error = (base_silent if before is None or now is None else base_changed)(merged.name)
    message, hint = (answer.of_model(text, merged.name) for text in (error.message, error.hint))
    why = replace(not_judged(message, hint), origin=Origin.MODEL)
    return answer.decided(merged, replace(report, files=()), [why], ())


def _comparing(group: Group, merged: Snapshot, settings: SettingsFiles) -> Group:
    """The group with each of its adapters compared, one at a time. The files are compared with those of the first."""
    tasks = (
        replace(
            task,
            turn=ALONE,
            consumers=(
                *task.without("forward", _NO_FORWARD).consumers,
                ConsumerSpec(feature="verify", settings=(merged, settings if task.index == 0 else None)),
            ),
        )
        for task in group.tasks
    )
    return replace(group, tasks=tuple(tasks))
