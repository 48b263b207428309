"""Config → Report, the whole flow on one page.

In: a valid `Config`, a device, an output directory, a view. Out: a `Report`, on disk from the start (provisional) and
as adapters are judged, so that a run that is killed leaves a true one. Imports no torch: worker.py runs what measures.

1. Names become directories, and the adapters' files are judged on their own.   resolve, preflight
2. Adapters are grouped by base, dtype and quantisation.                        `_plan`
3. A worker merges; each evidence becomes findings, a verdict and a report.     worker, checks, verdict
"""

from __future__ import annotations

import contextlib
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate import __version__
from merge_gate.engine import worker
from merge_gate.errors import GateError, ResolveError, UsageError
from merge_gate.judging import checks, verdict
from merge_gate.records import (
    AdapterFiles,
    AdapterReport,
    AdapterSpec,
    BaseFacts,
    BaseRef,
    BaseReport,
    BaseSpec,
    Config,
    Coverage,
    Environment,
    Evidence,
    Finding,
    Quantization,
    Report,
    Severity,
    Snapshot,
    record,
)
from merge_gate.report.files import FORMATS, write_report
from merge_gate.sources import resolve
from merge_gate.sources.preflight import preflight

if TYPE_CHECKING:
    from merge_gate.report.terminal import View

NEVER_LOADED = frozenset({"file-missing", "file-lfs-pointer", "file-corrupt", "pickle-refused", "config-unsafe"})
"""Findings of the preflight after which PEFT does not see the adapter, whatever severity the config gives them."""

PROVISIONAL = ("report.json",)
"""What is written while a run goes on; the other formats are there from its start and say that it is not complete."""

REST = 4.0
"""After a provisional report, no other for this many times as long as it took: with a thousand adapters, writing the
report after each would take longer than judging them."""


@record
class Ready:
    """One adapter (or combination) whose names have become files; `problem` says why one has not."""

    spec: AdapterSpec
    members: tuple[AdapterFiles, ...] = ()
    revision: str | None = None
    base: Snapshot | None = None
    problem: Finding | None = None

    @property
    def files(self) -> AdapterFiles:
        """The members' files as one; of an ordinary adapter, its own."""
        if len(self.members) == 1:
            return self.members[0]
        first = self.members[0] if self.members else AdapterFiles(directory="")
        return replace(
            first,
            tensors=tuple(tensor for one in self.members for tensor in one.tensors),
            files=tuple(file for one in self.members for file in one.files),
            findings=tuple(finding for one in self.members for finding in one.findings),
        )


def run_gate(
    config: Config,
    *,
    device: str = "auto",
    output: str | None = None,
    view: View | None = None,
    only: tuple[str, ...] = (),
    exhaustive: bool = False,
) -> Report:
    """Gate every adapter of the config (with `only`: those named).

    Where base and adapter hold no values large enough to leave the safe range, a sample of the merge is made (see
    lowrank.py); with `exhaustive`, all of it.

    Raises:
        UsageError: `only` names an adapter that the config does not list, or the output cannot be written.
    """
    return _Run(config, device=device, output=output, view=view, only=only, exhaustive=exhaustive).run()


def check_files(config: Config, *, view: View | None = None, only: tuple[str, ...] = ()) -> Iterator[AdapterReport]:
    """Judge config and files alone: no base is resolved, no model is loaded, torch is not imported."""
    sources = _Sources(config, view)
    for spec in select(config, only):
        ready = sources.adapter(spec)
        findings = _first_findings(ready)
        files = ready.files
        coverage = Coverage(
            adapter_tensors=len(files.tensors), parameters_checked=1, parameters_total=1, modules_merged=1
        )
        what, cause, findings = verdict.decide(findings, coverage)
        yield AdapterReport(
            name=spec.name,
            source=spec.source,
            revision=ready.revision,
            base=_base_ref(spec.base, spec.base.dtypes[0], files),
            peft_type=files.peft_type,
            verdict=what,
            cause=cause,
            findings=findings,
            coverage=Coverage(adapter_tensors=len(files.tensors)),
            files=files.files,
            line=spec.line,
            column=spec.column,
        )


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


# --- 1. names become files -----------------------------------------------------------------------------------------


class _Sources:
    """Resolves and reads each adapter and each base once, however often it is asked for."""

    def __init__(self, config: Config, view: View | None) -> None:
        self._config = config
        self._notify: Callable[[str], None] = view.note if view is not None else lambda _: None
        self._specs = {spec.name: spec for spec in config.adapters}
        self._read: dict[str, tuple[AdapterFiles, str | None]] = {}
        self._bases: dict[tuple[str, str | None], Snapshot | GateError] = {}

    def adapter(self, spec: AdapterSpec) -> Ready:
        names = spec.combine.adapters if spec.combine is not None else (spec.name,)
        members, revision = [], None
        for name in names:
            try:
                files, revision = self._files(self._specs[name])
            except GateError as error:
                return Ready(spec=spec, problem=checks.undecided(error.message, error.hint))
            except Exception as error:  # noqa: BLE001 - input that nobody thought of costs its own adapter
                return Ready(spec=spec, problem=checks.accident("its files could not be read", error))
            members.append(files)
        return Ready(spec=spec, members=tuple(members), revision=None if spec.combine else revision)

    def _files(self, spec: AdapterSpec) -> tuple[AdapterFiles, str | None]:
        if spec.name not in self._read:
            allow = self._config.allow_pickle
            found = resolve.resolve_adapter(spec, allow_pickle=allow, notify=self._notify)
            files = preflight(found.snapshot.directory, allow_pickle=allow, withheld=found.withheld)
            self._read[spec.name] = files, found.snapshot.revision
        return self._read[spec.name]

    def with_base(self, ready: Ready) -> Ready:
        """Add the base: the config's, else the one that adapter_config.json names."""
        wanted = ready.spec.base
        model, revision = wanted.model, wanted.revision
        if model is None:
            named, revision = ready.files.base_name, wanted.revision or ready.files.base_revision
            if not named:
                return replace(
                    ready,
                    problem=checks.undecided(
                        "no base to merge into: the config sets no base.model, and adapter_config.json names none",
                        "set base: {model: …} for the file or for this adapter",
                    ),
                )
            model = self._named_by_adapter(named)
        found = self._base(model, revision, wanted.label or model)
        if isinstance(found, GateError):
            return replace(ready, problem=checks.undecided(found.message, found.hint))
        return replace(ready, base=found)

    def _named_by_adapter(self, named: str) -> str:
        """A base named by adapter_config.json is a directory where one exists, beside the config, else a Hub id."""
        path = Path(self._config.path).resolve().parent / named
        try:
            return str(path) if path.is_dir() else named
        except (OSError, ValueError):  # a name that no file system takes
            return named

    def _base(self, model: str, revision: str | None, label: str) -> Snapshot | GateError:
        key = (model, revision)
        if key not in self._bases:
            try:
                self._bases[key] = resolve.resolve_base(
                    model,
                    revision,
                    trust_remote_code=self._config.trust_remote_code,
                    allow_pickle=self._config.allow_pickle,
                    label=label,
                    notify=self._notify,
                ).snapshot
            except GateError as error:
                self._bases[key] = error
            except Exception as error:  # noqa: BLE001 - the name comes from an adapter and may be anything
                self._bases[key] = ResolveError(
                    f"base {label[:80]!r} cannot be looked up: {type(error).__name__}",
                    hint="set base.model in the config, or correct base_model_name_or_path in adapter_config.json",
                )
        return self._bases[key]


def _first_findings(ready: Ready) -> tuple[Finding, ...]:
    """What can be said without a merge."""
    if ready.problem is not None and not ready.members:
        return (ready.problem,)
    judged = checks.judge(ready.spec, ready.files, None)
    return (*judged, ready.problem) if ready.problem is not None else judged


def _blocked(ready: Ready, findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """What keeps an adapter from being merged; empty where it may go on."""
    found = tuple(findings)
    if any(finding.severity is Severity.ERROR and finding.check != "expectation-failed" for finding in found):
        return found
    unsafe = [finding for finding in ready.files.findings if finding.check in NEVER_LOADED]
    if unsafe:
        why = checks.undecided(
            f"not merged, since {unsafe[0].check} was found (its severity in the config does not make it loadable)",
            unsafe[0].hint,
        )
        return (*found, why)
    return ()


# --- 2. the plan ---------------------------------------------------------------------------------------------------


@record
class Entry:
    """One line of the report to be: an adapter in one dtype."""

    ready: Ready
    dtype: str


def _entries(ready: Ready) -> tuple[Entry, ...]:
    return tuple(Entry(ready=ready, dtype=dtype) for dtype in ready.spec.base.dtypes)


def _plan(entries: list[Entry], open_entries: list[int], *, exhaustive: bool) -> tuple[worker.Group, ...]:
    """Group what is to be merged by base, revision, dtype and quantisation, in the order of the config."""
    groups: dict[tuple[object, ...], worker.Group] = {}
    for index in open_entries:
        entry = entries[index]
        base, spec = entry.ready.base, entry.ready.spec
        if base is None:
            raise AssertionError("an entry without a base is settled before the plan")
        key = (base.directory, base.revision, entry.dtype, spec.base.quantization)
        task = worker.Task(
            index=index,
            files=entry.ready.members,
            combine=spec.combine,
            thresholds=replace(checks.thresholds(spec), headroom=0.0) if exhaustive else checks.thresholds(spec),
        )
        group = groups.get(key) or worker.Group(
            label=base.name,
            directory=base.directory,
            revision=base.revision,
            dtype=entry.dtype,
            quantization=spec.base.quantization,
            tasks=(),
        )
        groups[key] = replace(group, tasks=(*group.tasks, task))
    return tuple(groups.values())


def _base_ref(spec: BaseSpec, dtype: str, files: AdapterFiles, facts: BaseFacts | None = None) -> BaseRef:
    if facts is not None:
        return BaseRef(model=facts.model, revision=facts.revision, dtype=facts.dtype, quantization=facts.quantization)
    return BaseRef(
        model=spec.label or spec.model or files.base_name,
        revision=spec.revision,
        dtype=dtype,
        quantization=spec.quantization,
    )


# --- 3. the run ----------------------------------------------------------------------------------------------------


class _Run:
    """One run: what is known so far, and how each event adds to it."""

    def __init__(
        self,
        config: Config,
        *,
        device: str,
        output: str | None,
        view: View | None,
        only: tuple[str, ...],
        exhaustive: bool,
    ) -> None:
        self._config, self._device, self._output, self._view = config, device, output, view
        self._exhaustive = exhaustive
        self._specs = select(config, only)
        self._entries: list[Entry] = []
        self._reports: dict[int, AdapterReport] = {}
        self._bases: list[BaseReport] = []
        self._digests: dict[str, threading.Thread] = {}
        self._digest: dict[str, str] = {}
        self._environment = _environment(device)
        self._groups: tuple[worker.Group, ...] = ()
        self._unwritten = False
        self._next_write_s = 0.0
        self._finished = False

    def run(self) -> Report:
        self._write(complete=False)
        try:
            quantizes = any(spec.base.quantization is not Quantization.NONE for spec in self._specs)
            with worker.Child(quantizes=quantizes) as child:  # it imports while the names become files
                return self._judge(child)
        except BaseException:
            if not self._finished:
                with contextlib.suppress(GateError):
                    self._write(complete=False)
            raise

    def _judge(self, child: worker.Child) -> Report:
        if self._view is not None:
            self._view.start(self._config.path, sum(len(spec.base.dtypes) for spec in self._specs))
        sources = _Sources(self._config, self._view)
        for spec in self._specs:
            self._entries.extend(_entries(self._prepared(sources, spec)))
        open_entries = [index for index in range(len(self._entries)) if not self._settled_by_files(index)]
        self._groups = _plan(self._entries, open_entries, exhaustive=self._exhaustive)
        for group in self._groups:
            self._start_digest(group.directory)
        self._catch_up(at_once=True)
        worker.supervise(
            worker.Job(
                groups=self._groups,
                device=self._device,
                allow_pickle=self._config.allow_pickle,
                trust_remote_code=self._config.trust_remote_code,
            ),
            self._listener(),
            child,
        )
        return self._finish()

    def _prepared(self, sources: _Sources, spec: AdapterSpec) -> Ready:
        ready = sources.adapter(spec)
        return ready if ready.problem is not None else sources.with_base(ready)

    def _settled_by_files(self, index: int) -> bool:
        ready = self._entries[index].ready
        findings = _first_findings(ready)
        blocked = _blocked(ready, findings)
        if blocked:
            self._settle(index, blocked, None)
        return bool(blocked)

    def _listener(self) -> worker.Listener:
        return worker.listening(
            {
                worker.Ready: self._on_ready,
                worker.BaseLoading: self._on_base_loading,
                worker.BaseLoaded: self._on_base_loaded,
                worker.Started: self._on_started,
                worker.Progressed: self._on_progressed,
                worker.Merged: self._on_merged,
                worker.Undecided: self._on_undecided,
                worker.Quiet: lambda _: self._catch_up(at_once=True),
            }
        )

    def _on_ready(self, event: worker.Ready) -> None:
        self._environment = replace(self._environment, device=event.device, device_name=event.device_name)

    def _on_base_loading(self, event: worker.BaseLoading) -> None:
        group = self._groups[event.group]
        if self._view is not None:
            self._view.base_loading(group.label, group.dtype)

    def _on_base_loaded(self, event: worker.BaseLoaded) -> None:
        facts = event.facts
        known = [(base.model, base.revision, base.dtype, base.quantization, base.parameters) for base in self._bases]
        key = (facts.model, facts.revision, facts.dtype, facts.quantization, facts.parameters)
        if key not in known:
            self._bases.append(
                BaseReport(
                    model=facts.model,
                    revision=facts.revision,
                    dtype=facts.dtype,
                    quantization=facts.quantization,
                    sha256=self._digest.get(self._groups[event.group].directory),
                    parameters=facts.parameters,
                    findings=tuple(checks.base_nonfinite(facts.nonfinite, facts.model)),
                )
            )
        if self._view is not None:
            self._view.base_loaded(facts, event.seconds)

    def _on_started(self, event: worker.Started) -> None:
        self._catch_up()
        entry = self._entries[event.task]
        if self._view is not None:
            done = len(self._reports)
            self._view.adapter_started(entry.ready.spec.name, done + 1, len(self._entries), entry.dtype)

    def _on_progressed(self, event: worker.Progressed) -> None:
        self._catch_up()
        if self._view is not None:
            self._view.adapter_progress(event.done, event.total, event.module)

    def _on_merged(self, event: worker.Merged) -> None:
        entry = self._entries[event.task]
        findings = checks.judge(entry.ready.spec, entry.ready.files, event.evidence)
        self._settle(event.task, findings, event.evidence)

    def _on_undecided(self, event: worker.Undecided) -> None:
        ready = self._entries[event.task].ready
        why = checks.undecided(event.refusal.message, event.refusal.hint, origin=event.refusal.origin)
        self._settle(event.task, (*_first_findings(ready), why), None)

    def _settle(self, index: int, findings: tuple[Finding, ...], evidence: Evidence | None) -> None:
        """One adapter has been judged: its line of the report, on disk and before the reader's eyes."""
        entry = self._entries[index]
        spec, files = entry.ready.spec, entry.ready.files
        coverage = _coverage(files, evidence)
        what, cause, findings = verdict.decide(findings, coverage)
        report = AdapterReport(
            name=spec.name,
            source=spec.source,
            revision=entry.ready.revision,
            base=_base_ref(spec.base, entry.dtype, files, evidence.base if evidence else None),
            peft_type=files.peft_type,
            verdict=what,
            cause=cause,
            findings=findings,
            coverage=coverage,
            files=files.files,
            seconds=evidence.seconds if evidence else 0.0,
            seed=evidence.seed if evidence else None,
            line=spec.line,
            column=spec.column,
        )
        self._reports[index] = report
        self._unwritten = True
        self._catch_up()
        if self._view is not None:
            self._view.adapter_done(report)

    def _finish(self) -> Report:
        for thread in self._digests.values():
            thread.join()
        self._bases = [replace(base, sha256=base.sha256 or self._digest_of(base)) for base in self._bases]
        report = self._write(complete=True)
        self._finished = True
        if self._view is not None:
            self._view.finish(report, self._output or "")
        return report

    def _catch_up(self, *, at_once: bool = False) -> None:
        """Write what has been judged since the last provisional report, unless that was a moment ago."""
        began = time.monotonic()
        if self._unwritten and (at_once or began >= self._next_write_s):
            self._write(complete=False, formats=PROVISIONAL)
            ended = time.monotonic()
            self._next_write_s = ended + REST * (ended - began)

    def _write(self, *, complete: bool, formats: Iterable[str] = tuple(FORMATS)) -> Report:
        report = Report(
            complete=complete,
            tool_version=__version__,
            environment=self._environment,
            config_path=self._config.path,
            config_sha256=self._config.sha256,
            bases=tuple(self._bases),
            adapters=tuple(self._reports[index] for index in sorted(self._reports)),
        )
        if self._output is not None:
            write_report(report, self._output, formats=formats)
        self._unwritten = False
        return report

    # The digest of a large base takes seconds of one core: it is taken while the worker imports and loads.

    def _start_digest(self, directory: str) -> None:
        if directory not in self._digests:
            thread = threading.Thread(target=self._take_digest, args=(directory,), daemon=True)
            with contextlib.suppress(RuntimeError):  # no thread to be had: the report goes without this digest
                thread.start()
                self._digests[directory] = thread

    def _take_digest(self, directory: str) -> None:
        with contextlib.suppress(Exception):  # the worker meets the same file and says what is wrong with it
            self._digest[directory] = resolve.digest_directory(directory, resolve.base_weight_files(directory))

    def _digest_of(self, base: BaseReport) -> str | None:
        for group in self._groups:
            if (group.label, group.revision) == (base.model, base.revision):
                return self._digest.get(group.directory)
        return None


def _coverage(files: AdapterFiles, evidence: Evidence | None) -> Coverage:
    if evidence is None:
        return Coverage(adapter_tensors=len(files.tensors))
    tensors = len(evidence.file_tensors)
    refused = evidence.refusal is not None
    return Coverage(
        adapter_tensors=tensors,
        applied=0 if refused else tensors - len(evidence.unexpected),
        modules_merged=len(evidence.targeted),
        parameters_checked=evidence.parameters_checked,
        parameters_bounded=evidence.parameters_bounded,
        parameters_total=evidence.parameters_total,
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
