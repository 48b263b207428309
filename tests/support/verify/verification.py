"""`merge-gate verify` in this process: the engine's comparison and the words for it, without the worker process.

In: directories. Out: the report's entry on the finished one.
"""

from pathlib import Path

from merge_gate._internal.errors import ResolveError
from merge_gate.engine.adapter_evidence import MergeRequest, merge
from merge_gate.engine.base import accounting
from merge_gate.engine.base.model_class import model_class_for
from merge_gate.features.verify import answer, finished_model
from merge_gate.features.verify.comparison import Comparison, SettingsFiles
from merge_gate.features.verify.directory import settings_files
from merge_gate.files.feed import LocalFeed
from merge_gate.files.preflight import preflight
from merge_gate.files.resolve import resolve_base
from merge_gate.records.files import Entry, Snapshot
from merge_gate.records.measured import Evidence
from merge_gate.records.report import AdapterReport
from merge_gate.records.terms import Severity
from tests.support.engine.base_headers import stored_tensors
from tests.support.gating import SPEC, Gate


class Verifier:
    """Keeps the bases that it has loaded."""

    def __init__(self) -> None:
        self._gate = Gate()

    def report(
        self, merged: Path, base: Path, adapter: Path, *candidates: Path, allowed: tuple[str, ...] = ()
    ) -> AdapterReport:
        files = preflight(str(adapter), allow_pickle=False)
        entry = Entry(spec=SPEC, dtype="auto", members=(files,), base=resolve_base(str(base)))
        try:
            finished = resolve_base(str(merged), label="merged")
        except ResolveError as error:
            return answer.unread_report(Snapshot(name="merged", directory=str(merged)), entry, error)
        if (decided := answer.before_merge(finished, entry)) is not None:
            return decided
        settings = settings_files(finished, entry)
        evidence, comparison = self.compared(finished, base, adapter, settings)
        others = {path.name: self.compared(finished, base, path)[1] for path in candidates}
        findings = answer.findings_of(finished, entry, comparison, others)
        return answer.compared_report(finished, entry, evidence, findings, allowed)

    def compared(
        self, finished: Snapshot, base: Path, adapter: Path, settings: SettingsFiles | None = None
    ) -> tuple[Evidence, Comparison]:
        files = preflight(str(adapter), allow_pickle=False)
        loaded = self._gate.base(base, files, dtype="auto")
        model_class = model_class_for(str(base), files, stored_tensors(base))
        account = accounting.account_for(str(base), model_class, base.name, stored_tensors(base))
        of_base = resolve_base(str(base)).base_files
        assert of_base is not None
        assert finished.base_files is not None
        with LocalFeed(str(base)) as base_feed, LocalFeed(finished.directory) as feed:
            own = finished_model.Files(directory=str(base), stored=of_base.tensors, feed=base_feed)
            others = finished_model.Files(
                directory=finished.directory, stored=finished.base_files.tensors, feed=feed, settings=settings
            )
            consumer = finished_model.comparing(
                others, own, base=loaded, model_class=model_class, label=finished.name, base_map=account.map
            )
            evidence = merge(MergeRequest(base=loaded, members=(files,), consumers=(consumer,)))
            comparison = dict(evidence.facts)["verify"]
            assert isinstance(comparison, Comparison)
            return evidence, comparison


def told(report: AdapterReport) -> str:
    """The findings, a line for each."""
    return "\n".join(f"{one.severity} {one.check}: {one.message}" for one in report.findings)


def errors(report: AdapterReport) -> list[str]:
    return [one.check for one in report.findings if one.severity is Severity.ERROR]
