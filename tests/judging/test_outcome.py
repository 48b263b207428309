"""What an adapter's files say decides whether PEFT may see it, whatever the configuration makes of the finding."""

from __future__ import annotations

import dataclasses

import pytest

from merge_gate.judging import outcome
from merge_gate.judging.check import Check, Symptom
from merge_gate.judging.table import CHECKS, NOT_JUDGED
from merge_gate.records.config import CheckSetting, Expect
from merge_gate.records.files import Entry, Prepared
from merge_gate.records.terms import Finding, Origin, Severity, Verdict
from tests.judging.test_checks import files, spec

NEVER_LOADED = ("file-missing", "file-lfs-pointer", "file-corrupt", "pickle-refused", "config-unsafe")


def entry(check: str, severity: Severity) -> Entry:
    found = Finding(check=check, severity=Severity.ERROR, message="m", hint="h", origin=Origin.FILE)
    chosen = spec(checks=(CheckSetting(check=check, severity=severity),))
    return Entry(prepared=Prepared(spec=chosen, members=(files(findings=(found,)),)), dtype="float32")


@pytest.mark.parametrize("severity", [Severity.WARNING, Severity.OFF])
@pytest.mark.parametrize("check", NEVER_LOADED)
def test_what_peft_must_not_see_is_not_loaded_at_any_severity(check: str, severity: Severity) -> None:
    report = outcome.blocked(entry(check, severity))
    assert report is not None
    assert (report.verdict, report.cause) == (Verdict.ERROR, NOT_JUDGED)
    assert any(f"not merged, since {check} was found" in finding.message for finding in report.findings)


@pytest.mark.parametrize("check", ["config-invalid", "keys-missing", "shape-mismatch"])
def test_what_the_load_finds_again_may_be_loaded_where_it_is_no_error(check: str) -> None:
    assert outcome.blocked(entry(check, Severity.WARNING)) is None
    report = outcome.blocked(entry(check, Severity.ERROR))
    assert report is not None
    assert (report.verdict, report.cause) == (Verdict.FAILED, check)


def test_an_adapter_that_is_not_the_expected_one_is_merged_all_the_same() -> None:
    prepared = Prepared(spec=spec(expect=Expect(r=8)), members=(files(),))
    assert [finding.check for finding in outcome.checked(prepared).findings] == ["expectation-failed"]
    assert outcome.blocked(Entry(prepared=prepared, dtype="float32")) is None


@pytest.mark.parametrize("version", ["0.21.2", None])
def test_the_release_that_saved_it_is_reported(version: str | None) -> None:
    member = files(config={"peft_version": version} if version else {})
    report = outcome.checked(Prepared(spec=spec(), members=(member,)))
    assert (report.peft_type, report.saved_by) == ("LORA", version)


@pytest.mark.parametrize("severity", list(Severity))
def test_a_file_check_that_somebody_forgot_lets_nothing_be_loaded(
    severity: Severity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one that is not in the table, nor one whose row says nothing of loading."""
    cursed = entry("file-cursed", severity)
    assert outcome.blocked(cursed) is not None
    row = Check(id="file-cursed", severity=Severity.ERROR, summary="It is cursed.", symptom=Symptom.BAD_FILE)
    for module in ("outcome", "checks"):
        monkeypatch.setattr(f"merge_gate.judging.{module}.CHECKS", {**CHECKS, row.id: row})
    assert outcome.blocked(cursed) is not None
    thought_about = {**CHECKS, row.id: dataclasses.replace(row, allows_loading=True)}
    monkeypatch.setattr("merge_gate.judging.outcome.CHECKS", thought_about)
    assert (outcome.blocked(cursed) is None) == (severity is not Severity.ERROR)


def test_the_rows_that_let_an_adapter_through_are_these() -> None:
    allowing = [row.id for row in CHECKS.values() if row.allows_loading]
    assert allowing == ["config-invalid", "keys-missing", "shape-mismatch"]
    assert [row.id for row in CHECKS.values() if row.allows_merging] == ["expectation-failed"]
