"""The verdicts of a run: puts each into the report, shows it, gives it its key, and withdraws it if its base changed.

In: entries of a run, and their evidence or the reason why there is none. Out: reports in the tally, and on disk.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from merge_gate._internal.errors import GateError
from merge_gate.files.base_watch import base_directory
from merge_gate.judging import adapter_report
from merge_gate.records.refusals import NotJudged, Refusal, log_of
from merge_gate.records.report import AdapterReport, BaseReport, Report
from merge_gate.records.terms import Origin, Verdict
from merge_gate.report.stored.report_files import FORMATS
from merge_gate.run.verdict_key import keyed
from merge_gate.run.view import HourlyLog
from merge_gate.worker.pinned import base_changed, base_silent

if TYPE_CHECKING:
    from merge_gate._internal.errors import EngineError
    from merge_gate.files.base_watch import BaseWatch
    from merge_gate.records.files import Entry
    from merge_gate.records.measured import Evidence
    from merge_gate.run.flow import Run
    from merge_gate.worker.protocol import ForwardRunning


class Verdicts:
    """The verdicts of one run. `device` is what it merges on, in the words of a key."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.device = ""
        self._without_key: dict[int, tuple[AdapterReport, BaseReport]] = {}
        self._running: set[int] = set()  # tasks whose models run, or whose process died meanwhile
        self._hourly = HourlyLog()

    def merging_begins(self) -> None:
        """Begin the hourly log. The verdicts so far needed no merge."""
        self._hourly.merging_begins(len(self._run.tally.reports))

    def note_model(self, event: ForwardRunning) -> None:
        """Note whether the model of an adapter runs."""
        (self._running.add if event.is_running else self._running.discard)(event.task)

    def judge(self, index: int, evidence: Evidence) -> None:
        """Report the verdict that follows from evidence."""
        run, entry = self._run, self._run.tally.entries[index]
        for feature in run.features.values():
            if (refusal := feature.refusal(index, evidence)) is not None:
                self.refuse(index, refusal)
                return
        run.watch.start(base_directory(entry))  # unless its bytes passed through this process
        report = adapter_report.merged_report(entry, evidence)
        group = next(group for group in run.groups if any(task.index == index for task in group.tasks))
        if group.plain_dtype is None and not (evidence.forward.missing or index in self._running):
            self._without_key[index] = report, adapter_report.base_report(evidence.base, entry.base_files)
        self._judged(index, report, evidence)

    def refuse(self, index: int, refusal: Refusal | NotJudged) -> None:
        """Report that there is no verdict on an entry."""
        entry = self._run.tally.entries[index]
        report = adapter_report.not_judged_report(entry, refusal)
        if refused := adapter_report.refused_base_report(report.base, refusal):  # the report lists this base too
            self._run.tally.use(base_directory(entry), refused, index)
        self._judged(index, report, None)

    def _judged(self, index: int, report: AdapterReport, evidence: Evidence | None) -> None:
        for feature in self._run.features.values():
            feature.judged(index, report, evidence)
        self.report(index, report)

    def report(self, index: int, report: AdapterReport) -> None:
        """Put the report of an entry into the run's report, and show it."""
        self._run.tally.set_report(index, report)
        self._run.writer.changed()
        self.catch_up()
        self._run.view.adapter_done(report)

    def catch_up(self, *, at_once: bool = False) -> None:
        """Do the periodic work that is due: give verdicts their keys, write a log line, write a provisional report."""
        self.add_keys()
        run = self._run
        if self._hourly.is_due:
            reports = run.tally.reports
            failed = sum(report.verdict is Verdict.FAILED for report in reports.values())
            run.view.note(self._hourly.line(len(reports), len(run.tally.entries), failed))
        try:
            run.writer.catch_up(run.report, at_once=at_once)
        except (GateError, OSError):
            raise
        except Exception as error:  # noqa: BLE001 - as above
            self.refuse_unshowable(error)

    def refuse_unshowable(self, error: Exception) -> None:
        """Refuse what the report cannot show: a worker may have sent it."""
        run = self._run
        unshowable = {
            base.key for base in run.report().bases if not _is_shown(replace(run.report(), adapters=(), bases=(base,)))
        }
        run.tally.forget(unshowable)
        for index, report in list(run.tally.reports.items()):
            if report.base in unshowable or not _is_shown(replace(run.report(), adapters=(report,), bases=())):
                self.refuse(index, senseless(error))

    def add_keys(self) -> None:
        """Add the keys of verdicts on bases whose digests are known by now; a digest may take longer than a merge."""
        run = self._run
        for index, (judged, base) in list(self._without_key.items()):
            entry = run.tally.entries[index]
            directory = base_directory(entry)
            if run.watch.digest(directory) is None:
                continue
            del self._without_key[index]
            try:
                self._add_key(index, entry, judged, base)
            except (GateError, OSError):
                raise
            except Exception as error:  # noqa: BLE001 - what the worker sent of this adapter cannot be cached
                self.refuse(index, senseless(error))

    def _add_key(self, index: int, entry: Entry, judged: AdapterReport, base: BaseReport) -> None:
        run = self._run
        content = run.watch.content(base_directory(entry)) if run.watch.is_unchanged(index) else None
        made = keyed(entry, judged, content, self.device, run.config.trusts) if content is not None else None
        if made is not None:
            run.tally.set_report(index, made[0])
            for feature in run.features.values():
                feature.decided(made[0], base, made[1])

    def withdraw_void(self) -> None:
        """Replace the verdicts on bases that changed during the run. An entry without a verdict keeps its reason."""
        run = self._run
        for indices in run.watch.void().values():
            reports = run.tally.reports
            judged = [index for index in indices if index in reports and reports[index].verdict is not Verdict.ERROR]
            if not judged:
                continue
            for index in judged:
                run.tally.set_report(index, withdrawn(run.tally.entries[index], run.watch))
            error = why_void(run.tally.entries[judged[0]], run.watch)
            run.view.note(f"{error.message}; the verdicts on it are withdrawn")


def senseless(error: Exception) -> NotJudged:
    """The reason why there is no verdict on an adapter whose evidence cannot be judged, shown, or cached."""
    message = f"what the gate's worker process sent of this adapter makes no sense: {type(error).__name__}: {error}"
    hint = "if the base has code of its own, use one without; if not, this is a bug of merge-gate: please report it"
    return NotJudged(message=message[:400], hint=hint, log=log_of(error))


def _is_shown(report: Report) -> bool:
    """Whether every format can be made of a report."""
    try:
        for render in FORMATS.values():
            render(report).encode()
    except Exception:  # noqa: BLE001 - of values that make no sense
        return False
    return True


def withdrawn(entry: Entry, watch: BaseWatch) -> AdapterReport:
    """The report of an entry whose base has changed during the run."""
    error = why_void(entry, watch)
    refusal = NotJudged(message=error.message, hint=error.hint, origin=Origin.BASE)
    return adapter_report.withdrawn_report(entry, refusal)


def why_void(entry: Entry, watch: BaseWatch) -> EngineError:
    """Why no verdict on the base of an entry counts."""
    is_silent = watch.is_silent(base_directory(entry))
    return (base_silent if is_silent else base_changed)(entry.base.name if entry.base is not None else "")
