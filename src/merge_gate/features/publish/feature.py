"""Publishes the models of one run, one for each adapter, from the plan of the run to the directories.

In: the entries of a run, and what the worker says about them. Out: directories of models, or why there is none.

1. `choose` decides which entries are published, and checks directory and disk before the first merge.
2. `planned` makes the files of a model, and passes them to the worker open. `written` gets the checksums.
3. `complete` copies the rest and reads everything back, when the last worker has ended.
4. `finish` gives the models of adapters that passed their names. The bases have not changed by then.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate._internal.errors import GateError, NotPublishedError, UsageError
from merge_gate._internal.text import counted, listing, quoted, shown_bytes
from merge_gate.features.publish.calls import PublicationService, PublicationWritten
from merge_gate.features.publish.companions import companion_identities
from merge_gate.features.publish.declared import EARLIER_MODEL, NOT_PUBLISHED
from merge_gate.features.publish.manifest import PublicationFacts
from merge_gate.features.publish.one_publication import Publication, publishing
from merge_gate.features.publish.partial import unchanged
from merge_gate.features.publish.publish_directory import prepared, refuse_inputs, refuse_small_disk, replaceable
from merge_gate.features.publish.weight_files import FLOATING, ModelLayout, base_layout
from merge_gate.files.base_watch import base_directory
from merge_gate.judging import kinds, verdict
from merge_gate.judging.adapter_report import base_report
from merge_gate.judging.bounds import bounded
from merge_gate.records.config import A_FILE, PublishSpec
from merge_gate.records.files import Entry, FileIdentity, StoredTensor
from merge_gate.records.measured import BaseFacts, Evidence
from merge_gate.records.report import AdapterReport, PublishedModel
from merge_gate.records.terms import PRESERVE, Finding, Origin, Verdict
from merge_gate.report.wording.untrusted import one_line
from merge_gate.run.feature import Feature
from merge_gate.worker.protocol import Job

if TYPE_CHECKING:
    from merge_gate.files.resolve import Fetching
    from merge_gate.run.flow import Run
    from merge_gate.worker.protocol import Group

_NONE_FITS = 10
"""More than there are dtypes."""

MODELS_AT_A_TIME = 4
"""So many are copied and read back at a time, when the worker has ended and its cores are free."""


def model_name(adapter: str, dtype: str) -> str:
    """The directory of an adapter's model."""
    return adapter if dtype == PRESERVE else f"{adapter}-{dtype}"


def join(run: Run) -> Feature:
    """The publications of a run.

    Raises:
        UsageError: the directory cannot be used.
    """
    assert run.config.publish is not None  # noqa: S101 - the run asks for it
    return Publications(run, run.config.publish)


class Publications(Feature):
    """The models of a run. For a plan, nothing is created or removed."""

    hashes_again = True

    def __init__(self, run: Run, spec: PublishSpec) -> None:
        self._run, self._spec = run, spec
        self._names = tuple(adapter.name for adapter in run.specs)
        self._made = contextlib.ExitStack()
        refuse_inputs(Path(spec.directory).resolve(), run.inputs)
        names = [model_name(name, spec.dtype) for name in self._names]
        self._parent = prepared(spec.directory, names, self._made, is_plan=run.options.is_plan)
        self._chosen: dict[int, Entry] = {}
        self._models: dict[int, Publication] = {}
        self._refused: dict[int, NotPublishedError] = {}
        self._bases: dict[str, ModelLayout] = {}
        self._loaded: dict[int, BaseFacts] = {}
        self._seen: dict[str, dict[str, FileIdentity]] = {}
        self._lock = threading.Lock()  # threads of the service plan models, and this one discards them

    def close(self) -> None:
        """Remove every model that has no name yet."""
        for index in self._models:
            self._discard(index)
        self._made.close()

    # --- 1 ---------------------------------------------------------------------------------------------------------

    def fetch(self, how: Fetching) -> Fetching:
        return replace(how, tokenizer_files=True)

    def choose(self, entries: dict[int, Entry]) -> None:
        """Decide which of the entries to merge are published.

        An adapter has one model. If it is merged in several dtypes, the one that is published is the named one, or the
        one that the base is stored in.

        Raises:
            UsageError: the directory of a model is inside a base, or would replace an input; or none of the dtypes that
                an adapter is merged in can be published.
            GateError: the disk is too small.
        """
        self._chosen = one_of_each(entries, self._spec.dtype)
        is_plan = self._run.options.is_plan
        for index, entry in () if is_plan else self._chosen.items():
            self._add(index, entry)
        refuse_inputs(self._parent, _inputs(entries.values()), {model.directory for model in self._models.values()})
        if is_plan:
            return
        refuse_small_disk(
            self._parent,
            sum(model.expected.size_bytes for model in self._models.values()),
            "the models to publish",
            "free some space, choose another disk with --publish, or publish fewer adapters with --only",
        )
        if self._models and (note := unpublished_dtypes(entries, self._models)):
            self._run.view.note(note)

    def needs_merge(self, index: int) -> bool:
        return index in self._chosen

    def schedule(self, groups: Sequence[Group]) -> Iterator[Group]:
        consumers = {index: model.publishing for index, model in self._models.items()}
        if self._run.options.is_plan:
            consumers = dict.fromkeys(self._chosen, publishing(self._spec.dtype))
        for group in groups:
            tasks = (
                task.with_consumer(consumers[task.index]) if task.index in consumers else task for task in group.tasks
            )
            yield replace(group, tasks=tuple(tasks))

    def plan(self) -> Iterator[tuple[str, str]]:
        entries = self._run.tally.entries
        tasks = {task.index: group.files.weight_bytes for group in self._run.groups for task in group.tasks}
        sizes = {index: size for index, size in tasks.items() if index in self._chosen}
        note = unpublished_dtypes({index: entries[index] for index in tasks}, sizes)
        count, size = counted(len(sizes), "model"), shown_bytes(sum(sizes.values()))
        yield (
            "publish",
            "; ".join(filter(None, (f"{one_line(self._spec.label, 120)}: {count} at most, about {size}", note))),
        )

    def _add(self, index: int, entry: Entry) -> None:
        directory = base_directory(entry)
        try:
            if directory not in self._bases:
                self._bases[directory] = base_layout(directory)
            for seen in (directory, *(member.directory for member in entry.members)):
                self._seen.setdefault(seen, companion_identities(seen))
            target = self._parent / model_name(entry.spec.name, self._spec.dtype)
            is_streamed = entry.base_files is not None and entry.base_files.is_streamed
            layout = self._bases[directory]
            self._models[index] = Publication(target, self._spec, layout, directory, is_streamed=is_streamed)
        except NotPublishedError as error:
            self._refused[index] = error

    # --- 2: the worker ---------------------------------------------------------------------------------------------

    def service(self, job: Job) -> PublicationService | None:
        tasks = [task.index for group in job.groups for task in group.tasks if task.model_files]
        return PublicationService(self, tasks) if tasks else None

    def planned(self, task: int, tensors: tuple[StoredTensor, ...]) -> tuple[int, ...]:
        if self._models[task].is_accepted:
            raise NotPublishedError("the merge was judged before")
        self._refused.pop(task, None)
        with self._lock, self._guarded(task) as model:
            return model.plan(tensors)

    def written(self, message: PublicationWritten) -> None:
        if not self._models[message.task].is_accepted:
            with self._lock, self._guarded(message.task) as model:
                model.written(message)

    def ended(self) -> None:
        for index, model in self._models.items():
            if not model.is_accepted:
                self._discard(index)

    @contextlib.contextmanager
    def _guarded(self, index: int) -> Iterator[Publication]:
        """Whatever goes wrong in the block costs this model, and not the run: the first error counts."""
        model = self._models[index]
        try:
            yield model
        except Exception as error:
            model.discard()
            raise self._refused.setdefault(index, _explained(error, model.directory)) from error

    # --- 3 and 4: the verdict --------------------------------------------------------------------------------------

    def judged(self, index: int, report: AdapterReport, evidence: Evidence | None) -> None:
        """What the worker plans or writes of an adapter from now on does not count."""
        if index not in self._models:
            return
        if report.verdict is Verdict.PASSED and evidence is not None:
            self._loaded[index] = evidence.base
            self._models[index].is_accepted = True
        else:
            self._discard(index)

    def _discard(self, index: int) -> None:
        with self._lock:
            self._models[index].discard()

    def complete(self) -> None:
        """Complete the models of the adapters that passed. No worker may be alive."""
        passed = [index for index, model in self._models.items() if model.is_accepted and index not in self._refused]
        with ThreadPoolExecutor(MODELS_AT_A_TIME) as pool:
            try:
                for _ in pool.map(self._complete, passed):
                    pass
            finally:  # a signal ends the run
                for index in passed:
                    self._models[index].stop()

    def _complete(self, index: int) -> None:
        with contextlib.suppress(NotPublishedError), self._guarded(index) as model:
            model.complete()

    def finish(self) -> None:
        """Give the models of adapters that passed their names. The weights of their bases are no longer read."""
        tally, note = self._run.tally, self._run.view.note
        for index in sorted(self._chosen):
            report = tally.reports.get(index)
            if report is None or report.verdict is not Verdict.PASSED:
                if index in self._models:
                    self._discard(index)
                continue
            try:
                published, findings = self._publish(index, report)
            except NotPublishedError as error:
                tally.set_report(index, _unpublished(report, error.message, error.hint))
                note(f"{report.name}: not published: {error.message}")
            else:
                findings = (*report.findings, *bounded(findings))
                tally.set_report(index, replace(report, published=published, findings=findings))
                note(f"{report.name}: published to {published.directory}")
        self._warn_of_earlier_models()

    def _publish(self, index: int, report: AdapterReport) -> tuple[PublishedModel, tuple[Finding, ...]]:
        """Give a model its name. The findings are what there is to say about its files."""
        if index in self._refused:
            raise self._refused[index]
        with self._guarded(index) as model:
            earlier = replaceable(model.directory, self._run.view.note)
            files, findings = model.publish(self._facts(index, report, model), self._seen, replaces=earlier)
        directory = str(Path(self._spec.label, model.directory.name))
        return PublishedModel(directory=directory, dtype=self._spec.dtype, files=files), findings

    def _facts(self, index: int, report: AdapterReport, model: Publication) -> PublicationFacts:
        run = self._run
        entry, watch = run.tally.entries[index], run.watch
        directory = base_directory(entry)
        if index not in self._loaded or not watch.is_unchanged(index):
            raise NotPublishedError(
                "the digest of the base's files is not known",
                hint="let nothing write to the base during the run, and run the gate again",
            )
        base = base_report(self._loaded[index], entry.base_files)
        return PublicationFacts(
            entry=entry,
            report=report,
            base=replace(base, sha256=watch.digest(directory), files=watch.files(directory)),
            base_identity=watch.identity(directory),
            environment=run.tally.environment,
            config=run.config,
            spec=model.spec,
            tensors=model.tensors,
            base_tensors=model.base_tensors,
            settings=model.settings,
        )

    def _warn_of_earlier_models(self) -> None:
        """Name the models of earlier runs that adapters still have which have no new one."""
        tally = self._run.tally
        published = {report.name for report in tally.reports.values() if report.published is not None}
        for name in self._names:
            folder = model_name(name, self._spec.dtype)
            if name in published or not unchanged(self._parent / folder, weights=False):
                continue
            own = [(index, report) for index, report in sorted(tally.reports.items()) if report.name == name]
            index, report = min(own, key=lambda pair: pair[1].verdict is Verdict.PASSED)
            warned = _with_earlier_model(report, str(Path(self._spec.label, folder)))
            tally.set_report(index, warned)
            self._run.view.note(f"warning: {name}: {warned.findings[-1].message}")


def _explained(error: Exception, target: Path) -> NotPublishedError:
    if isinstance(error, GateError):
        return NotPublishedError(error.message, hint=error.hint)
    if isinstance(error, OSError):
        return NotPublishedError(
            f"the model cannot be written to {quoted(str(target), 200)}: {error.strerror or error}",
            hint="free some space there, or publish to another disk",
        )
    return NotPublishedError(
        f"the model could not be written: unexpected {type(error).__name__}: {str(error)[:200]}",
        hint="this is a bug of merge-gate: please report it",
    )


def one_of_each(entries: Mapping[int, Entry], wanted: str) -> dict[int, Entry]:
    """The entries that are published with the dtype `wanted`: the one of each adapter that fits it best.

    Raises:
        UsageError: it is merged in no dtype that can be published. What `auto` loads is known only later.
    """
    chosen: dict[str, tuple[int, int, Entry]] = {}
    for index, entry in entries.items():
        fitting = ("auto", *_stored_dtypes(entry)) if wanted == PRESERVE else (wanted, "auto")
        rank = fitting.index(entry.dtype) if entry.dtype in fitting else _NONE_FITS
        if entry.spec.name not in chosen or rank < chosen[entry.spec.name][0]:
            chosen[entry.spec.name] = rank, index, entry
    for rank, _, entry in chosen.values():
        stored = _stored_dtypes(entry)
        if rank == _NONE_FITS and entry.dtype != "auto" and stored:
            expected, why = (
                (stored[0], f"`preserve` writes each tensor as its base stores it, in {stored[0]}")
                if wanted == PRESERVE
                else (wanted, f"publish.dtype is {wanted}")
            )
            raise UsageError(
                f"the merge of {quoted(entry.spec.name, 200)} in {entry.dtype} cannot be published: {why}",
                hint=f"add {expected} to --dtype (base.dtype), or set publish.dtype to {entry.dtype} in {A_FILE}",
            )
    return {index: entry for _, index, entry in chosen.values()}


def unpublished_dtypes(entries: Mapping[int, Entry], published: Collection[int]) -> str:
    """A note on the dtypes that adapters are only checked in; empty if there are none."""
    checked, shown = (
        listing(dict.fromkeys(entry.dtype for index, entry in entries.items() if (index in published) is is_published))
        for is_published in (False, True)
    )
    return f"the merge in {shown} is published, and the one in {checked} is only checked" if checked else ""


def _stored_dtypes(entry: Entry) -> tuple[str, ...]:
    """The dtypes of the floating tensors in the base's files, the most frequent one first."""
    names = {stored: name for name, stored in FLOATING.items()}
    tensors = entry.base_files.tensors if entry.base_files is not None else ()
    counts = Counter(names[tensor.dtype] for tensor in tensors if tensor.dtype in names)
    return tuple(name for name, _ in counts.most_common())


def _inputs(entries: Iterable[Entry]) -> Iterable[tuple[str, str]]:
    for entry in entries:
        yield base_directory(entry), f"the base {quoted(base_directory(entry), 200)}"
        for member in entry.members:
            yield member.directory, f"the adapter {quoted(entry.spec.name, 200)}"


def _unpublished(report: AdapterReport, message: str, hint: str) -> AdapterReport:
    """The report of an entry that passed, and whose merge could not be published."""
    text = f"the merge passed, and was not published: {message}"
    why = kinds.finding(NOT_PUBLISHED, text, hint=hint, origin=Origin.RUNTIME)
    what, index, findings = verdict.decide((*bounded([why]), *report.findings), report.coverage)
    return replace(
        report,
        verdict=what,
        cause=None if index is None else findings[index].check,
        decided_by=index,
        findings=findings,
    )


def _with_earlier_model(report: AdapterReport, directory: str) -> AdapterReport:
    """The report of an entry that has no new model, while `directory` has the one of an earlier run."""
    warning = kinds.finding(
        EARLIER_MODEL,
        f"{quoted(directory, 200)} still has the model of an earlier run: this run has published nothing there",
        hint="do not use it for this adapter: remove it, or publish again when the adapter passes",
        origin=Origin.RUNTIME,
    )
    return replace(report, findings=(*report.findings, *bounded([warning])))
