"""Known failures that somebody answers for until the end of a day: which of them the lines of a report have.

In: lines of the report, the baseline of the config, today's date. Out: the same lines, `accepted` where the baseline
has all that is wrong; and what came of each of its entries. A failed adapter stays `failed`: nothing here makes it
pass.

1. An entry is of one adapter, by the digest of its files, and of one cause. There are no patterns.
2. It covers an adapter only where every check that failed it is named.
3. It ends with its last day.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

from merge_gate.records.report import Accepted, AdapterReport, BaselineEntry
from merge_gate.records.terms import Acceptance, Severity, Verdict

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Iterable, Sequence

    from merge_gate.records.config import KnownFailure
    from merge_gate.records.files import FileRecord

WORST_LAST = (Acceptance.UNMATCHED, Acceptance.USED, Acceptance.MORE, Acceptance.EXPIRED)
"""One entry may match several lines, in one dtype or another: the worst is told."""


def adapter_digest(files: Iterable[FileRecord]) -> str | None:
    """SHA-256 over one line per file, as sha256sum writes them, in their order; None where no file was read."""
    lines = [f"{one.sha256}  {one.path}\n" for one in files]
    return hashlib.sha256("".join(lines).encode("utf-8", "backslashreplace")).hexdigest() if lines else None


def failing_checks(adapter: AdapterReport) -> frozenset[str]:
    """Every check that fails the adapter, the cause among them."""
    return frozenset(one.check for one in adapter.findings if one.severity is Severity.ERROR)


def accept(
    adapters: Sequence[AdapterReport], baseline: Sequence[KnownFailure], today: dt.date
) -> tuple[tuple[AdapterReport, ...], tuple[BaselineEntry, ...]]:
    """The lines, and one entry for each of the baseline."""
    known = {(one.adapter, one.cause): one for one in baseline}
    outcomes = dict.fromkeys(baseline, Acceptance.UNMATCHED)
    lines = []
    for adapter in adapters:
        one = known.get((adapter_digest(adapter.files) or "", adapter.cause or "")) if known else None
        if one is not None and adapter.verdict is Verdict.FAILED:
            outcome = _outcome(one, adapter, today)
            outcomes[one] = max(outcome, outcomes[one], key=WORST_LAST.index)
            if outcome is Acceptance.USED:
                mark = Accepted(reason=one.reason, owner=one.owner, until=one.until.isoformat())
                adapter = replace(adapter, accepted=mark)  # noqa: PLW2901 - the line as it will stand
        lines.append(adapter)
    return tuple(lines), tuple(_entry(one, outcome) for one, outcome in outcomes.items())


def _outcome(one: KnownFailure, adapter: AdapterReport, today: dt.date) -> Acceptance:
    if today > one.until:
        return Acceptance.EXPIRED
    return Acceptance.USED if failing_checks(adapter) <= {one.cause, *one.also} else Acceptance.MORE


def _entry(one: KnownFailure, outcome: Acceptance) -> BaselineEntry:
    return BaselineEntry(
        adapter=one.adapter,
        cause=one.cause,
        also=one.also,
        reason=one.reason,
        owner=one.owner,
        until=one.until.isoformat(),
        outcome=outcome,
        line=one.line,
    )
