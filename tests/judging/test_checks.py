"""Several checks together: what their settings do, and who is blamed. tests/judging/checks/ has each by itself."""

import dataclasses
import re
from collections.abc import Iterator
from itertools import permutations

import pytest

from merge_gate.judging.all_checks import measure_options
from merge_gate.judging.checks.check import Check, FileCase, Symptom
from merge_gate.judging.checks.phrases import describe_nonfinite
from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.not_judged import NOT_JUDGED, not_judged
from merge_gate.records.config import CheckSetting
from merge_gate.records.measured import Evidence, FileTensor, MeasureOptions, TensorStats
from merge_gate.records.refusals import NotJudged
from merge_gate.records.terms import Finding, ForwardMode, Origin, Severity
from tests.support.judging.cases import (
    LORA_A,
    LORA_B,
    MODULE,
    NAMED,
    base,
    broken,
    evidence,
    files,
    found_in_files,
    judge,
    judged,
    lossy,
    merged,
    of,
    reason,
    setting,
    spec,
    tensor,
    with_settings,
)
from tests.support.judging.every_check import GOLDENS, TESTS
from tests.support.wording import Wording

OTHER_BASE = {"base_model_name_or_path": "acme/mistral"}
"""What fires base-mismatch on `NAMED`."""


def test_every_check_has_its_module_its_tests_and_a_place() -> None:
    assert [row.blame for row in CHECKS.values()] == sorted({row.blame for row in CHECKS.values()})
    names = {check.replace("-", "_") for check in CHECKS}
    assert {row.of_merge.__module__.rpartition(".")[2] for row in CHECKS.values()} <= names | {"check"}
    assert {path.stem.removeprefix("test_") for path in TESTS} == names
    assert GOLDENS.keys() == CHECKS.keys()


def test_a_check_judges_in_the_phases_that_its_decorator_names() -> None:
    row = Check("odd", Severity.ERROR, Origin.FILE, Symptom.BAD_FILE, blame=1, page=None)

    def judge_it(_: FileCase) -> Iterator[Finding]:
        yield from ()

    on_files, on_merge = row.on_files(judge_it), row.on_merge(judge_it)
    assert on_files == dataclasses.replace(row, of_files=judge_it, of_merge=judge_it)
    assert on_merge == dataclasses.replace(row, of_merge=judge_it)
    assert on_merge.of_files is row.of_files


def test_the_rows_that_let_an_adapter_through_are_these() -> None:
    allowing = [row.id for row in CHECKS.values() if row.allows_loading]
    assert allowing == ["config-invalid", "keys-missing", "shape-mismatch", "expectation-failed"]
    assert [row.id for row in CHECKS.values() if row.allows_merging] == ["expectation-failed"]


def test_a_sound_adapter_has_no_findings() -> None:
    assert judge(spec(), files(), evidence()) == ()
    assert judge(spec(), files(), None) == ()


@pytest.mark.parametrize(
    ("stats", "figures"),
    [
        (broken(nan=1), ["1", "64", "0", "7"]),
        (broken(nan=1, posinf=2, neginf=3), ["1", "2", "3", "64", "0", "7"]),
        (broken(nan=60, posinf=4), ["60", "4", "64"]),
        (tensor(nan=2048, numel=16384, first_index=(3,)), ["2,048", "16,384", "3"]),
    ],
)
def test_nonfinite_values_are_counted_and_placed(stats: TensorStats, figures: list[str], wording: Wording) -> None:
    wording(describe_nonfinite(stats))
    assert re.findall(r"\d[\d,]*\d|\d", describe_nonfinite(stats)) == figures


@pytest.mark.parametrize("severity", [Severity.ERROR, Severity.WARNING, Severity.OFF])
def test_a_note_stays_a_note(severity: Severity) -> None:
    note = Finding(check="base-mismatch", severity=Severity.NOTE, message="a path", origin=Origin.CONFIG)
    chosen = with_settings(spec(), setting("base-mismatch", severity))
    assert judge(chosen, files(findings=(note,)), None) == (note,)


@pytest.mark.parametrize(
    ("check", "limit", "evidence_"),
    [
        ("rounding-loss", 0.9, evidence(merges=(lossy(0.81),))),
        ("headroom", 0.95, evidence(merges=(merged(tensor(maximum=60000.0)),))),
        ("delta-norm", 30.0, evidence(merges=(merged(base_norm=1.0, delta_norm=20.0),))),
    ],
)
def test_a_limit_is_what_the_config_says(check: str, limit: float, evidence_: Evidence) -> None:
    assert of(check, judge(spec(), files(), evidence_))
    assert not of(check, judge(with_settings(spec(), setting(check, Severity.WARNING, limit)), files(), evidence_))
    lower = setting(check, Severity.ERROR, limit / 2)
    (finding,) = judge(with_settings(spec(), lower), files(), evidence_)
    assert finding.severity is Severity.ERROR
    assert dict(finding.measured)["limit"] == limit / 2


def test_causes_come_before_what_follows_from_them() -> None:
    everything = evidence(
        base=base(nonfinite=(broken("model.norm.weight"),)),
        file_tensors=(FileTensor(stats=broken(LORA_B)),),
        merges=(merged(broken()), merged(module="layers.6", changed=False)),
        targeted=(MODULE, "layers.6"),
        missing=(LORA_A,),
    )
    checks = [finding.check for finding in judge(spec(), files(), everything)]
    assert checks == ["keys-missing", "base-nonfinite", "adapter-nonfinite", "merged-nonfinite", "no-effect"]


def test_another_base_is_named_beside_refused_files() -> None:
    cut = Finding(check="file-corrupt", severity=Severity.ERROR, message="cut", hint="", origin=Origin.FILE)
    findings = judge(spec(base=NAMED), files(config=OTHER_BASE, findings=(cut,)), None)
    assert [finding.check for finding in findings] == ["file-corrupt", "base-mismatch"]


def test_what_the_gate_could_not_do_is_no_check() -> None:
    out_of_memory = NotJudged(message="out of memory", hint="a larger machine")
    (finding,) = judge(spec(), files(), evidence(refusal=out_of_memory, merges=()))
    assert finding == not_judged("out of memory", "a larger machine")
    assert finding.check == NOT_JUDGED not in CHECKS
    assert not_judged("out of memory").hint == ""


@pytest.mark.parametrize("severity", [Severity.ERROR, Severity.OFF])
def test_a_check_that_crashes_hides_no_other(severity: Severity, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is switched off stays off."""

    def crash(_: object) -> Iterator[Finding]:
        raise ZeroDivisionError("no weights, no norm")

    monkeypatch.setattr(
        "merge_gate.judging.all_checks.CHECKS",
        {**CHECKS, "delta-norm": dataclasses.replace(CHECKS["delta-norm"], of_files=crash)},
    )
    findings = judged(found_in_files("file-corrupt"), setting("file-corrupt", severity))
    (finding,) = of(NOT_JUDGED, findings)
    assert "delta-norm" in finding.message
    assert "ZeroDivisionError: no weights, no norm" in finding.message
    assert bool(of("file-corrupt", findings)) == (severity is Severity.ERROR)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((), MeasureOptions(estimates=True, estimated_ratio=250.0, error_limit=0.8)),
        ((setting("rounding-loss", Severity.ERROR),), MeasureOptions(estimated_ratio=250.0, error_limit=0.8)),
        ((setting("delta-norm", Severity.ERROR),), MeasureOptions(estimated_ratio=250.0, error_limit=0.8)),
        (
            (setting("delta-norm", Severity.WARNING),),
            MeasureOptions(estimates=True, estimated_ratio=250.0, error_limit=0.8),
        ),
        (
            (CheckSetting(check="rounding-loss", severity=Severity.WARNING, limit=0.4, error_limit=0.9),),
            MeasureOptions(estimates=True, estimated_ratio=250.0, error_limit=0.9),  # the norm is no error
        ),
        (
            (CheckSetting(check="delta-norm", severity=Severity.WARNING, limit=10.0, error_limit=40.0),),
            MeasureOptions(estimates=True, estimated_ratio=10.0, error_limit=0.8),
        ),
        (
            (setting("headroom", Severity.ERROR),),
            MeasureOptions(estimates=True, estimated_ratio=250.0, error_limit=0.8),
        ),
    ],
)
def test_an_error_rests_on_a_measurement(settings: tuple[CheckSetting, ...], expected: MeasureOptions) -> None:
    assert measure_options(with_settings(dataclasses.replace(spec(), forward=ForwardMode.OFF), *settings)) == expected


def test_rows_are_measured_if_they_decide_whether_a_model_is_run() -> None:
    found = {mode: measure_options(dataclasses.replace(spec(), forward=mode)).rows for mode in ForwardMode}
    assert found == {ForwardMode.AUTO: True, ForwardMode.OFF: False, ForwardMode.REQUIRED: False}


FIRST, *_, LAST = CHECKS
UNKNOWN = "file-cursed"
"""No check of the table."""


def found(check: str, severity: Severity = Severity.ERROR, message: str = "m") -> Finding:
    return Finding(check=check, severity=severity, message=message, origin=Origin.FILE)


def order(findings: tuple[Finding, ...], evidence_: Evidence | None) -> list[str]:
    return [one.check for one in judge(spec(), files(findings=findings), evidence_)]


@pytest.mark.parametrize("evidence_", [None, evidence()], ids=["files", "merge"])
@pytest.mark.parametrize("checks", [*permutations((FIRST, LAST, UNKNOWN))], ids="-".join)
def test_what_the_table_does_not_know_is_the_cause(checks: tuple[str, ...], evidence_: Evidence | None) -> None:
    """A found without a row must not hide behind others, whatever comes first."""
    assert order(tuple(map(found, checks)), evidence_) == [UNKNOWN, FIRST, LAST]


@pytest.mark.parametrize("checks", [(UNKNOWN, NOT_JUDGED), (NOT_JUDGED, UNKNOWN)], ids="-".join)
def test_what_the_table_does_not_know_keeps_its_place(checks: tuple[str, ...]) -> None:
    assert order((found(LAST), *map(found, checks)), None) == [*checks, LAST]


def test_the_severity_counts_more_than_the_check() -> None:
    findings = (
        found(UNKNOWN, Severity.NOTE),
        found(FIRST, Severity.WARNING),
        found(UNKNOWN, Severity.WARNING),
        found(LAST),
    )
    assert judge(spec(), files(findings=findings), None) == tuple(findings[index] for index in (3, 2, 1, 0))


def test_findings_of_one_check_keep_their_order() -> None:
    findings = tuple(found(LAST, message=message) for message in ("b", "a", "c"))
    assert judge(spec(), files(findings=findings), None) == findings


def test_a_refused_merge_is_blamed_in_its_place() -> None:
    refused = evidence(refusal=reason("targets_not_found", targets=("query",), of_base=("q_proj",)), merges=())
    around = ("expectation-failed", "file-corrupt")
    assert order(tuple(map(found, around)), refused) == ["file-corrupt", "targets-not-found", "expectation-failed"]


def test_a_merge_that_was_not_judged_comes_before_every_check() -> None:
    refused = evidence(refusal=NotJudged(message="gone"), merges=())
    assert order((found(LAST), found(FIRST)), refused) == [NOT_JUDGED, FIRST, LAST]
