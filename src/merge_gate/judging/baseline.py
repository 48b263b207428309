"""Matches failed adapters with the known failures that the baseline accepts.

In: the report's adapters, the baseline, and today's date. Out: the same adapters, `accepted` if the baseline covers
them, and the outcome of each baseline entry; a failed adapter stays `failed`.
"""

# 1. An entry names one adapter, by the digest of its files, and one cause. There are no patterns.
# 2. It accepts an adapter only if it names every check that failed it.
# 3. It ends after its last day.

from __future__ import annotations

import datetime as dt
import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

from merge_gate.records.report import Accepted, AdapterReport
from merge_gate.records.terms import Acceptance, BaselineEntry, Severity, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from merge_gate.records.files import HashedFile

WORST_LAST = (Acceptance.UNMATCHED, Acceptance.USED, Acceptance.MORE, Acceptance.EXPIRED)
"""An entry may match an adapter in several dtypes. Its outcome is the one that comes last here."""


def adapter_digest(files: Iterable[HashedFile]) -> str | None:
    """SHA-256 of the lines that sha256sum writes for the files, in their order; None if no file was read."""
    lines = [f"{file.sha256}  {file.path}\n" for file in files]
    return hashlib.sha256("".join(lines).encode("utf-8", "backslashreplace")).hexdigest() if lines else None


def failing_checks(adapter: AdapterReport) -> frozenset[str]:
    """Every check that fails the adapter, including the cause."""
    return frozenset(finding.check for finding in adapter.findings if finding.severity is Severity.ERROR)


def accept(
    adapters: Sequence[AdapterReport], baseline: Sequence[BaselineEntry], today: dt.date
) -> tuple[tuple[AdapterReport, ...], tuple[BaselineEntry, ...]]:
    """The adapters, each accepted or not, and the entries of the baseline with their outcomes."""
    known = {(entry.adapter, entry.cause): entry for entry in baseline}
    outcomes = dict.fromkeys(baseline, Acceptance.UNMATCHED)
    matched = []
    for adapter in adapters:
        entry = known.get((adapter_digest(adapter.files) or "", adapter.cause or ""))
        if entry is not None and adapter.verdict is Verdict.FAILED:
            outcome = _outcome(entry, adapter, today)
            outcomes[entry] = max(outcome, outcomes[entry], key=WORST_LAST.index)
            if outcome is Acceptance.USED:
                accepted = Accepted(reason=entry.reason, owner=entry.owner, until=entry.until)
                matched.append(replace(adapter, accepted=accepted))
                continue
        matched.append(adapter)
    return tuple(matched), tuple(replace(entry, outcome=outcome) for entry, outcome in outcomes.items())


def _outcome(entry: BaselineEntry, adapter: AdapterReport, today: dt.date) -> Acceptance:
    if today > dt.date.fromisoformat(entry.until):
        return Acceptance.EXPIRED
    return Acceptance.USED if failing_checks(adapter) <= {entry.cause, *entry.also} else Acceptance.MORE
