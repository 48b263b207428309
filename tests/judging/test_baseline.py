"""A known failure is accepted as long as it is the same one and somebody answers for it; it never passes."""

from __future__ import annotations

import datetime as dt
import hashlib
import os
from dataclasses import replace

import pytest

from merge_gate.judging.baseline import accept, adapter_digest
from merge_gate.records.files import HashedFile
from merge_gate.records.report import Accepted
from merge_gate.records.terms import Acceptance, BaselineEntry, Result, Verdict
from tests.support.reports import CRASHED, FAILED, PASSED, SHA256, report

DAY = dt.date(2026, 3, 1)
KNOWN = BaselineEntry(
    adapter=adapter_digest(FAILED.files) or "",
    cause="adapter-nonfinite",
    also=("merged-nonfinite",),
    reason="retrained in spring",
    owner="team-a",
    until="2026-03-01",
    outcome=Acceptance.UNMATCHED,
    line=5,
)


def test_a_known_failure_is_accepted_and_stays_failed() -> None:
    (line,), (entry,) = accept([FAILED], [KNOWN], DAY)
    assert line.verdict is Verdict.FAILED
    assert line.accepted == Accepted(reason="retrained in spring", owner="team-a", until="2026-03-01")
    assert entry == replace(KNOWN, outcome=Acceptance.USED)
    assert report(line, PASSED).result is Result.PASS
    assert report(line, PASSED).accepted == 1


@pytest.mark.parametrize(
    ("known", "today", "outcome"),
    [
        (KNOWN, DAY + dt.timedelta(days=1), Acceptance.EXPIRED),
        (replace(KNOWN, also=()), DAY, Acceptance.MORE),
        (replace(KNOWN, cause="no-effect"), DAY, Acceptance.UNMATCHED),
        (replace(KNOWN, adapter="0" * 64), DAY, Acceptance.UNMATCHED),
    ],
)
def test_what_is_not_covered_fails_the_run(known: BaselineEntry, today: dt.date, outcome: Acceptance) -> None:
    (line,), (entry,) = accept([FAILED], [known], today)
    assert line.accepted is None
    assert entry.outcome is outcome
    assert report(line, PASSED).result is Result.FAIL


def test_neither_passed_nor_unjudged_adapters_are_accepted() -> None:
    lines, (entry,) = accept([replace(PASSED, files=FAILED.files), replace(CRASHED, files=FAILED.files)], [KNOWN], DAY)
    assert [one.accepted for one in lines] == [None, None]
    assert entry.outcome is Acceptance.UNMATCHED
    assert report(*lines).result is Result.ERROR


def test_one_more_failure_fails_the_run() -> None:
    lines, _ = accept([FAILED, replace(FAILED, name="two", files=())], [KNOWN], DAY)
    assert report(*lines).result is Result.FAIL
    assert report(*lines).accepted == 1


def test_the_digest_is_of_all_files_in_their_order() -> None:
    one, two = (HashedFile(path=name, size_bytes=1, sha256=SHA256) for name in ("a", "b"))
    assert adapter_digest([]) is None
    assert len({adapter_digest(files) for files in ([one], [two], [one, two], [two, one])}) == 4
    written = f"{SHA256}  a\n{SHA256}  caf\\udce9\n"
    odd = replace(two, path=os.fsdecode(b"caf\xe9"))
    assert adapter_digest([one, odd]) == hashlib.sha256(written.encode()).hexdigest(), "as sha256sum writes them"
