"""The whole flow of `merge-gate verify` on one page: a finished directory and the names of base and adapter ▶ `Report`.

In: what the command line asks for, and a view. Out: a report with one entry, which is about the directory. Imports no
torch: only the worker process does.

1. Resolve the names, and read the headers of the directory.          files/resolve.py
2. Merge the adapter and each candidate, and compare each merge.      run/flow.py, finished_model.py
3. Name the kind of the directory.                                    answer.py
4. Write the report.                                                  run/tally.py
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from merge_gate._internal.errors import GateError, ResolveError, UsageError
from merge_gate._internal.text import quoted
from merge_gate.config.paths import InvalidName, ResolvedName, resolve_name
from merge_gate.features.verify import answer
from merge_gate.features.verify.comparison import Comparison
from merge_gate.features.verify.directory import settings_files
from merge_gate.files import resolve
from merge_gate.files.base_watch import BaseWatch, base_directory
from merge_gate.files.identity import directory_identity
from merge_gate.files.resolve import Fetching
from merge_gate.judging import adapter_report
from merge_gate.judging.not_judged import not_judged
from merge_gate.limits.timeout import ANSWER_TIMEOUT_S, within
from merge_gate.names.hub_names import HUB, close_directory
from merge_gate.records.config import Config
from merge_gate.records.features import part, parts
from merge_gate.records.files import MANIFEST_NAME, Entry, FileIdentity, Snapshot
from merge_gate.records.measured import Evidence
from merge_gate.records.options import RunOptions
from merge_gate.records.report import AdapterReport, Report
from merge_gate.records.terms import Access, BaseKey, Origin, Quantization
from merge_gate.report.stored.output_directory import begun_run
from merge_gate.run.feature import Feature
from merge_gate.run.flow import Run
from merge_gate.run.tally import ReportWriter, Tally
from merge_gate.run.verdicts import withdrawn
from merge_gate.run.view import View
from merge_gate.worker.pinned import base_changed, base_silent
from merge_gate.worker.protocol import ALONE, ConsumerSpec, DeviceChosen, Event, Group, Merged
from merge_gate.worker.supervisor import WorkerSlot

DEVICE = "cpu"
"""Other devices may round otherwise."""

_NO_MODEL = "merge-gate verify compares values, and runs no model"


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
    for _, module in parts("release"):
        module.refuse_alone(merged)
    name, path, _ = _resolved(merged)
    before = _identity(path or "")
    if path is None:
        raise UsageError(
            f"{quoted(name, 200)} is not a directory here", hint="give --adapter to compare a model on the Hub"
        )
    try:
        report = answer.recorded_report(name, name, allowed)
        sha256 = resolve.digest_file(Path(name, MANIFEST_NAME))
    except OSError as error:
        raise GateError(f"{quoted(name, 200)} cannot be read: {error.strerror or error}") from error
    report = _unless_swapped(report, Snapshot(name=name, directory=name), before)
    config = Config(path=None, directory=str(Path.cwd()), sha256=sha256, adapters=())
    tally = Tally(config, device=DEVICE, watch=BaseWatch())
    tally.set_report(0, report)
    with begun_run(output):
        return ReportWriter(output, view).finish(replace(tally.report(complete=True), is_comparison=True))


class Verification(Feature):
    """Compares a finished model with the merge of the first adapter of `config`. The others are candidates.

    It is the feature of a run of these adapters, which shows only its progress, and whose report is not used.

    Args:
        config: the adapters, on one base.
        merged: the directory or Hub id of the finished model.
        allowed: kinds that do not fail it.
        output: the directory that the reports go to; None writes none.
        view: shows the progress.
        worker: may hold a process that was started before.
    """

    may_decide_all = True

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
        self._name, self._allowed, self._output = merged, allowed, output
        self._view, self._progress = view, _Progress(view, merged)
        self._run = Run(config, RunOptions(device=DEVICE), self._progress, worker, features={"verify": self})
        self._tally = Tally(config, device=DEVICE, watch=self._run.watch)
        self._writer = ReportWriter(output, view)
        self._merged: Snapshot | ResolveError | None = None
        self._report: AdapterReport | None = None
        self._release: Any = None  # the module that measures the model, if its values are not those of a merge
        self._comparisons: dict[int, Any] = {}
        self._evidence: dict[int, Evidence] = {}

    def compare(self) -> Report:
        """Compare, and write the report.

        Raises:
            UsageError: there is no such directory, or the output directory cannot be used.
            GateError: the report cannot be written.
        """
        _refuse_inside(self._name, self._output)
        with contextlib.closing(self._run):
            before = _identity(self._name)
            merged = self._merged = self._resolved()
            if before is None and isinstance(merged, Snapshot):  # a model on the Hub
                before = _identity(merged.directory)
            with begun_run(self._output):
                self._writer.write_first(replace(self._tally.report(), is_comparison=True))
                self._run.run()
                report = self._unless_changed(self._report or self._compared())
                if isinstance(merged, Snapshot):
                    report = _unless_swapped(report, merged, before)
                self._view.adapter_done(report)
                self._tally.set_report(0, report)
                return self._writer.finish(replace(self._tally.report(complete=True), is_comparison=True))

    # --- 1. ----------------------------------------------------------------------------------------------------------

    def fetch(self, how: Fetching) -> Fetching:
        return replace(how, tokenizer_files=True, code_files=True, read_pickle=None)

    def _resolved(self) -> Snapshot | ResolveError:
        """The finished directory, or why its files cannot be read as a model's."""
        for _, module in parts("release"):
            if (release := module.file_release(self._name)) is not None:
                self._release = module
                return cast("Snapshot", release)
        label, path, hub_id = _resolved(self._name)
        if hub_id == self._name and (close := close_directory(hub_id, Path.cwd(), is_base=False)):
            hint = f"did you mean {quoted(close, 200)}? If it is on the Hub, write {quoted(HUB + hub_id, 200)}"
            raise UsageError(f"no such directory: {quoted(hub_id, 200)}", hint=hint)
        try:
            how = replace(self._run.fetching(), access=Access.STREAM)
            merged = resolve.resolve_base(path or hub_id or label, None, how, label=label)
            self._release = next((module for _, module in parts("release") if module.is_release(merged)), None)
            if self._release is None or merged.fetched is None:
                return merged
            how = replace(how, access=Access.DOWNLOAD)
            return resolve.resolve_base(hub_id or label, None, how, label=label)
        except ResolveError as error:
            if path is not None or error.check is not None:
                return error
            raise

    # --- 2. ----------------------------------------------------------------------------------------------------------

    def needs_merge(self, index: int) -> bool:  # noqa: ARG002
        return True

    def choose(self, entries: dict[int, Entry]) -> None:
        """Merge nothing if the files decide."""
        entry, merged = self._run.tally.entries[0], self._merged
        if isinstance(merged, Snapshot):
            blocked = self._run.tally.reports.get(0)
            is_release = self._release is not None
            decided = (
                answer.before_merge(merged, entry, is_release=is_release)
                if blocked is None
                else answer.without_merge(merged, blocked)
            )
            self._report = decided
        elif merged is not None:
            self._report = answer.unread_report(Snapshot(name=self._name, directory=self._name), entry, merged)
        if self._report is not None:
            entries.clear()

    def schedule(self, groups: Sequence[Group]) -> Iterator[Group]:
        """Compare each adapter, one at a time. The files are compared with those of the first."""
        merged = self._merged
        if not groups or not isinstance(merged, Snapshot):
            return
        if self._release is not None:
            yield from self._release.groups_of(merged, self._run.tally.entries[0], groups, no_forward=_NO_MODEL)
            return
        settings, files = settings_files(merged, self._run.tally.entries[0]), merged.base_files
        assert files is not None  # noqa: S101 - it was resolved as a base
        for group in groups:
            tasks = []
            for task in group.tasks:
                consumer = ConsumerSpec(feature="verify", settings=(merged, settings if task.index == 0 else None))
                tasks.append(replace(task, turn=ALONE, consumers=(*task.consumers, consumer), no_forward=_NO_MODEL))
            yield replace(group, tasks=tuple(tasks))
        key = BaseKey(model=merged.name, revision=merged.revision, dtype="auto", quantization=Quantization.NONE.value)
        yield Group(base=key, directory=merged.directory, files=files, fed=True, tasks=())

    def received(self, event: Event) -> None:
        self._progress.is_merging = True
        match event:
            case DeviceChosen():
                self._tally.merged_on(event.device, event.device_name, event.sandbox)
            case Merged():
                facts = dict(event.evidence.facts)
                feature = "verify" if self._release is None else "quantized"
                comparison = facts.get(feature)
                if isinstance(comparison, part(feature, "records").FACT):
                    self._comparisons[event.task] = comparison

    def judged(self, index: int, report: AdapterReport, evidence: Evidence | None) -> None:
        merged, entry = self._merged, self._run.tally.entries[index]
        if evidence is not None:
            self._evidence[index] = evidence
            base = adapter_report.base_report(evidence.base, entry.base_files)
            self._tally.use(base_directory(entry), base, index)
        elif index == 0 and isinstance(merged, Snapshot):
            self._report = answer.without_merge(merged, report)

    # --- 3. ----------------------------------------------------------------------------------------------------------

    def _compared(self) -> AdapterReport:
        entries, merged = self._run.tally.entries, self._merged
        assert isinstance(merged, Snapshot)  # noqa: S101 - else, there is a report
        comparison = self._comparisons.get(0, Comparison())
        judged = self._comparisons.items()
        candidates = {entries[index].spec.source: compared for index, compared in judged if index > 0}
        findings_of = answer.findings_of if self._release is None else self._release.findings_of
        findings = findings_of(merged, entries[0], comparison, candidates)
        never = set[str]() if self._release is None else self._release.never_allowed(comparison)
        allowed = {*self._allowed} - never
        return answer.compared_report(merged, entries[0], self._evidence[0], findings, allowed)

    def _unless_changed(self, report: AdapterReport) -> AdapterReport:
        """The report, or an error if the base was written to meanwhile."""
        watch = self._run.watch
        if not any(0 in indices for indices in watch.void().values()):
            return report
        void = withdrawn(self._run.tally.entries[0], watch)
        return replace(void, name=report.name, source=report.source, compared_with=report.compared_with)


class _Progress(View):
    """Shows of a run that it compares a model, how the merges progress, and notes on what is done before."""

    def __init__(self, view: View, name: str) -> None:
        self._view, self._name, self.is_merging = view, name, False
        self.base_loading, self.base_loaded = view.base_loading, view.base_loaded  # type: ignore[method-assign]
        self.adapter_progress = view.adapter_progress  # type: ignore[method-assign]

    def start(self, config_path: str, adapter_count: int, merge_count: int) -> None:  # noqa: ARG002
        self._view.start_comparison(self._name)

    def adapter_started(self, name: str, index: int, total: int, dtype: str) -> None:  # noqa: ARG002
        self._view.adapter_started(name, 1, 1, dtype)

    def note(self, message: str) -> None:
        if not self.is_merging:
            self._view.note(message)


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
        return within(ANSWER_TIMEOUT_S, lambda: directory_identity(directory))
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


def _resolved(name: str) -> ResolvedName:
    """The directory or the Hub id of the model. The name of a model is never a glob."""
    try:
        return resolve_name(name, Path.cwd(), on_hub=False, is_base=True)[0]
    except InvalidName as problem:
        message, hint = problem.args
        raise UsageError(message, hint=hint() if callable(hint) else hint) from None
