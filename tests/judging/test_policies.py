"""What the policies set, which known failures are accepted, and how much of a finding a report holds."""

import dataclasses
import datetime as dt
import hashlib
import os
from dataclasses import replace
from typing import get_args

import pytest

from merge_gate.cli.parser import parsed
from merge_gate.config.model import FileEntry
from merge_gate.judging.all_checks import judge_merge
from merge_gate.judging.baseline import accept, adapter_digest
from merge_gate.judging.bounds import MOST_CHARACTERS, MOST_FINDINGS, bounded, cut
from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.policies import DEFAULT, POLICIES, Policy
from merge_gate.records.config import CheckSetting
from merge_gate.records.files import HashedFile
from merge_gate.records.report import Accepted
from merge_gate.records.terms import Acceptance, BaselineEntry, Finding, Origin, Result, Severity, Verdict
from tests.support.judging.cases import base, broken, evidence, files, spec
from tests.support.reports import CRASHED, FAILED, PASSED, SHA256, report
from tests.support.wording import Wording

RELEASE = POLICIES["release"]


def test_the_default_changes_nothing() -> None:
    for check, row in CHECKS.items():
        assert POLICIES[DEFAULT].setting(check) == CheckSetting(check=check, severity=row.severity, limit=row.limit)
    assert POLICIES[DEFAULT] == Policy()


def test_a_release_is_stricter_and_only_that() -> None:
    for check, row in CHECKS.items():
        expected = Severity.ERROR if check in RELEASE.errors else row.severity
        assert RELEASE.setting(check).severity is expected
    assert all(CHECKS[check].severity is Severity.WARNING for check in RELEASE.errors), "each row changes something"


def test_the_words_are_the_same_everywhere() -> None:
    assert set(get_args(FileEntry.model_fields["policy"].annotation)) == set(POLICIES)
    assert parsed(["run", "x", "--policy", "release"]).policy in POLICIES
    with pytest.raises(SystemExit):
        parsed(["run", "x", "--policy", DEFAULT])  # no option and no variable makes a reviewed file less strict


@pytest.mark.parametrize("check", sorted(CHECKS))
def test_a_warning_about_the_base_is_an_error(check: str) -> None:
    """Whichever check it is of: here, of an infinite buffer."""
    limit = replace(broken("rotary.limit", posinf=1), is_buffer=True)
    case = evidence(base=base(nonfinite=(limit,)))
    settings = tuple(POLICIES["release" if name == check else DEFAULT].setting(name) for name in CHECKS)
    found = [one for one in judge_merge(spec(checks=settings), files(), case) if one.origin is Origin.BASE]
    assert [one.check for one in found] == ["base-nonfinite"]
    assert found[0].severity is (Severity.ERROR if check == "base-nonfinite" else Severity.WARNING)


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
    base="b" * 64,
    dtype=FAILED.base.dtype,
    quantization=str(FAILED.base.quantization),
)
DIGESTS = {FAILED.base: "b" * 64}


ANY_BASE = replace(KNOWN, base=None, dtype=None, quantization=None)


def test_an_entry_for_a_cause_in_the_files_holds_for_any_base() -> None:
    of_files = replace(FAILED, findings=tuple(one for one in FAILED.findings if one.check == "adapter-nonfinite"))
    for digests in ({}, DIGESTS):
        (line,), (entry,) = accept([of_files], [replace(ANY_BASE, also=())], DAY, digests)
        assert (entry.outcome, line.accepted is not None) == (Acceptance.USED, True)


def test_several_entries_for_one_adapter_on_several_bases() -> None:
    other = replace(FAILED, base=replace(FAILED.base, dtype="float32"))
    entries = [KNOWN, replace(KNOWN, dtype="float32", line=9)]
    lines, used = accept([FAILED, other], entries, DAY, DIGESTS | {other.base: "b" * 64})
    assert [line.accepted is not None for line in lines] == [True, True]
    assert [entry.outcome for entry in used] == [Acceptance.USED] * 2
    lines, used = accept([FAILED, other], entries[:1], DAY, DIGESTS | {other.base: "b" * 64})
    assert [line.accepted is not None for line in lines] == [True, False]


def test_without_a_digest_no_base_is_known() -> None:
    (line,), (entry,) = accept([FAILED], [KNOWN], DAY, {FAILED.base: None})
    assert (line.accepted, entry.outcome) == (None, Acceptance.UNMATCHED)


def test_a_known_failure_is_accepted_and_stays_failed() -> None:
    (line,), (entry,) = accept([FAILED], [KNOWN], DAY, DIGESTS)
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
        (replace(KNOWN, base="c" * 64), DAY, Acceptance.UNMATCHED),
        (replace(KNOWN, dtype="float32"), DAY, Acceptance.UNMATCHED),
        (replace(KNOWN, quantization="bnb-4bit"), DAY, Acceptance.UNMATCHED),
        (ANY_BASE, DAY, Acceptance.UNBOUND),
    ],
)
def test_what_is_not_covered_fails_the_run(known: BaselineEntry, today: dt.date, outcome: Acceptance) -> None:
    (line,), (entry,) = accept([FAILED], [known], today, DIGESTS)
    assert line.accepted is None
    assert entry.outcome is outcome
    assert report(line, PASSED).result is Result.FAIL


def test_neither_passed_nor_unjudged_adapters_are_accepted() -> None:
    lines, (entry,) = accept(
        [replace(PASSED, files=FAILED.files), replace(CRASHED, files=FAILED.files)], [KNOWN], DAY, DIGESTS
    )
    assert [one.accepted for one in lines] == [None, None]
    assert entry.outcome is Acceptance.UNMATCHED
    assert report(*lines).result is Result.ERROR


def test_one_more_failure_fails_the_run() -> None:
    lines, _ = accept([FAILED, replace(FAILED, name="two", files=())], [KNOWN], DAY, DIGESTS)
    assert report(*lines).result is Result.FAIL
    assert report(*lines).accepted == 1


def test_the_digest_is_of_all_files_in_their_order() -> None:
    one, two = (HashedFile(path=name, size_bytes=1, sha256=SHA256) for name in ("a", "b"))
    assert adapter_digest([]) is None
    assert len({adapter_digest(files) for files in ([one], [two], [one, two], [two, one])}) == 4
    written = f"{SHA256}  a\n{SHA256}  caf\\udce9\n"
    odd = replace(two, path=os.fsdecode(b"caf\xe9"))
    assert adapter_digest([one, odd]) == hashlib.sha256(written.encode()).hexdigest(), "as sha256sum writes them"


def finding(check: str = "config-invalid", message: str = "m", severity: Severity = Severity.ERROR) -> Finding:
    return Finding(check=check, severity=severity, message=message, origin=Origin.CONFIG)


def test_what_is_few_and_short_stays_as_it_is() -> None:
    few = tuple(finding(message=str(number)) for number in range(MOST_FINDINGS))
    assert bounded(few) == few


def test_what_is_left_out_is_counted_by_check_and_severity(wording: Wording) -> None:
    many = [finding() for _ in range(MOST_FINDINGS + 7)]
    warnings = [finding(severity=Severity.WARNING) for _ in range(3)]
    found = bounded([*many, *warnings, finding("file-missing")])
    assert len(found) == MOST_FINDINGS + 3 + 1 + 1
    assert found[-1].measured == (("more", 7.0),)
    wording(found[-1].message)
    assert (found[-1].check, found[-1].severity) == ("config-invalid", Severity.ERROR)


def test_a_text_of_just_the_length_is_whole(wording: Wording) -> None:
    assert cut("x" * MOST_CHARACTERS) == "x" * MOST_CHARACTERS
    longer = cut("x" * (MOST_CHARACTERS + 1))
    assert longer.startswith("x" * MOST_CHARACTERS + "…")
    wording(longer.strip("x"))


def test_every_text_of_a_finding_is_cut_and_nothing_else() -> None:
    long = "x " * MOST_CHARACTERS
    one = dataclasses.replace(finding(message=long), hint=long, module=long, tensor=long, nan=3)
    cut_long = cut(long)
    assert bounded([one]) == (
        dataclasses.replace(one, message=cut_long, hint=cut_long, module=cut_long, tensor=cut_long),
    )
    assert bounded([dataclasses.replace(one, module="", tensor="")])[0].module == ""
    assert bounded([dataclasses.replace(one, module="", tensor="")])[0].tensor == ""


def test_the_rest_is_the_first_left_out_without_its_words() -> None:
    shown = [finding(message=str(number)) for number in range(MOST_FINDINGS)]
    more = [dataclasses.replace(finding(), origin=Origin.ADAPTER, module="m"), finding(), finding()]
    *_, rest = bounded([*shown, *more])
    assert rest == Finding(
        check="config-invalid",
        severity=Severity.ERROR,
        message=rest.message,
        origin=Origin.ADAPTER,
        measured=(("more", 3.0),),
    )
