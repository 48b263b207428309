"""Matches failed adapters with the known failures that the baseline accepts.

In: the report's adapters, the baseline, and today's date. Out: the same adapters, `accepted` if the baseline covers
them, and the outcome of each baseline entry; a failed adapter stays `failed`.
"""

# 1. An entry names one adapter, by the digest of its files, and one cause. There are no patterns.
# 2. It accepts an adapter only if it names every check that failed it.
# 3. It ends after its last day.
# 4. If a check needs the base to fail the adapter, it names the base's digest, dtype, and quantization.

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from merge_gate.records.report import Accepted, AdapterReport, BaseReport
from merge_gate.records.terms import Acceptance, BaseKey, BaselineEntry, Severity, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from merge_gate.records.files import HashedFile

WORST_LAST = (Acceptance.UNMATCHED, Acceptance.USED, Acceptance.UNBOUND, Acceptance.MORE, Acceptance.EXPIRED)
"""An entry may match an adapter in several dtypes. Its outcome is the one that comes last here."""


OF_FILES = frozenset(
    ("file-missing", "file-lfs-pointer", "file-corrupt", "pickle-refused", "config-invalid", "config-unsafe",
     "adapter-nonfinite", "expectation-failed", "not-reproducible", "meaning-changed")
)  # fmt: skip
"""The checks that `merge-gate check` decides without a base."""

OF_FILES_ALONE = OF_FILES | {"keys-missing", "shape-mismatch"}
"""And those that it can decide, of a file that is empty; then no base is loaded."""

Digests = Mapping[BaseKey, str | None]
"""The digest of each base of a run."""


def digests_of(bases: Iterable[BaseReport]) -> Digests:
    """The digests of the bases, by what identifies them in the reports of adapters."""
    return {
        BaseKey(model=b.model, revision=b.revision, dtype=b.dtype, quantization=b.quantization): b.sha256 for b in bases
    }


def needs_base(adapter: AdapterReport) -> bool:
    """Whether another base could change what fails the adapter."""
    alone = OF_FILES if adapter.coverage.parameters_total else OF_FILES_ALONE
    return not failing_checks(adapter) <= alone


def adapter_digest(files: Iterable[HashedFile]) -> str | None:
    """SHA-256 of the lines that sha256sum writes for the files, in their order; None if no file was read."""
    lines = [f"{file.sha256}  {file.path}\n" for file in files]
    return hashlib.sha256("".join(lines).encode("utf-8", "backslashreplace")).hexdigest() if lines else None


def failing_checks(adapter: AdapterReport) -> frozenset[str]:
    """Every check that fails the adapter, including the cause."""
    return frozenset(finding.check for finding in adapter.findings if finding.severity is Severity.ERROR)


def accept(
    adapters: Sequence[AdapterReport], baseline: Sequence[BaselineEntry], today: dt.date, digests: Digests
) -> tuple[tuple[AdapterReport, ...], tuple[BaselineEntry, ...]]:
    """The adapters, each accepted or not, and the entries of the baseline with their outcomes."""
    outcomes = dict.fromkeys(baseline, Acceptance.UNMATCHED)
    matched = []
    for adapter in adapters:
        entry = _entry_for(adapter, baseline, digests) if adapter.verdict is Verdict.FAILED else None
        if entry is not None:
            outcome = _outcome(entry, adapter, today)
            outcomes[entry] = max(outcome, outcomes[entry], key=WORST_LAST.index)
            if outcome is Acceptance.USED:
                accepted = Accepted(reason=entry.reason, owner=entry.owner, until=entry.until)
                matched.append(replace(adapter, accepted=accepted))
                continue
        matched.append(adapter)
    return tuple(matched), tuple(replace(entry, outcome=outcome) for entry, outcome in outcomes.items())


def _entry_for(adapter: AdapterReport, baseline: Sequence[BaselineEntry], digests: Digests) -> BaselineEntry | None:
    """The entry for the adapter and its cause, on its base; or the entry that names no base."""
    digest, base = adapter_digest(adapter.files), adapter.base
    where = (digests.get(base), base.dtype, str(base.quantization))
    fitting = [entry for entry in baseline if (entry.adapter, entry.cause) == (digest, adapter.cause)]
    bound = (entry for entry in fitting if (entry.base, entry.dtype, entry.quantization) == where and entry.base)
    return next(bound, None) or next((entry for entry in fitting if entry.base is None), None)


def _outcome(entry: BaselineEntry, adapter: AdapterReport, today: dt.date) -> Acceptance:
    if entry.base is None and needs_base(adapter):
        return Acceptance.UNBOUND
    if today > dt.date.fromisoformat(entry.until):
        return Acceptance.EXPIRED
    return Acceptance.USED if failing_checks(adapter) <= {entry.cause, *entry.also} else Acceptance.MORE
