"""Each case of `tests.support.all_faults` through the gate: verdict, cause, origin and the tensor it names."""

import pytest

from merge_gate.judging.checks.table import CHECKS
from merge_gate.records.report import AdapterReport
from merge_gate.records.terms import Finding, Severity, Verdict
from tests.support.all_faults import FAULTS, HEALTHY
from tests.support.cases import Judged, told
from tests.support.faults import Case, Payload


def deciding(report: AdapterReport) -> list[Finding]:
    return [f for f in report.findings if f.check == report.cause and f.severity is Severity.ERROR]


def test_the_table_is_as_large_as_promised() -> None:
    names = [case.name for case in (*FAULTS, *HEALTHY)]
    assert len(names) == len(set(names))
    assert len(FAULTS) >= 40
    assert len(HEALTHY) >= 20


def test_every_check_has_a_case() -> None:
    cases = (*FAULTS, *HEALTHY)
    assert CHECKS.keys() <= {case.cause for case in cases} | {check for case in cases for check in case.warnings}


@pytest.mark.parametrize("case", FAULTS, ids=lambda case: case.name)
def test_a_fault_is_caught_and_explained(case: Case, judged: Judged) -> None:
    report = judged.reports[case.name]
    assert report.verdict.value in case.verdict.split("|"), told(report)
    assert report.findings, told(report)
    for finding in report.findings:
        assert finding.message, told(report)
        assert finding.hint, told(report)
        assert "Traceback" not in finding.message, told(report)
    if case.cause is None:
        return
    assert report.cause == case.cause, told(report)
    findings = deciding(report)
    assert findings, told(report)
    assert case.origin is None or findings[0].origin.value == case.origin, told(report)
    assert case.tensor is None or any(case.tensor in (f.tensor or "") for f in findings), told(report)


@pytest.mark.parametrize("case", HEALTHY, ids=lambda case: case.name)
def test_a_healthy_adapter_passes_and_is_covered_whole(case: Case, judged: Judged) -> None:
    report = judged.reports[case.name]
    assert report.verdict is Verdict.PASSED, told(report)
    assert report.cause is None, told(report)
    assert not [f for f in report.findings if f.severity is Severity.ERROR], told(report)
    warned = {f.check for f in report.findings if f.severity is Severity.WARNING}
    assert warned == set(case.warnings), told(report)
    coverage = report.coverage
    assert coverage.parameters_checked == coverage.parameters_total > 0
    assert coverage.applied == coverage.adapter_tensors > 0
    assert coverage.modules_merged > 0


def test_bad_elements_are_counted_and_the_first_is_placed(judged: Judged) -> None:
    (finding,) = deciding(judged.reports["neginf-lora_B-last"])
    assert (finding.nan, finding.posinf, finding.neginf) == (0, 0, 1)
    assert finding.numel == 16 * 4
    assert finding.first_index == (15, 3)
    (finding,) = deciding(judged.reports["nan-lora_A-all"])
    assert (finding.nan, finding.posinf, finding.neginf) == (4 * 32, 0, 0)
    assert finding.first_index == (0, 0)


def test_a_pickled_payload_never_runs(judged: Judged) -> None:
    assert not list(judged.adapters_directory.rglob(Payload.MARK))


def test_nan_in_a_tensor_that_nothing_uses_is_a_warning(judged: Judged) -> None:
    report = judged.reports["stray-nan"]
    assert ("adapter-nonfinite", Severity.WARNING) in {(f.check, f.severity) for f in report.findings}, told(report)


def test_what_follows_from_the_cause_is_listed_too(judged: Judged) -> None:
    checks = {finding.check for finding in judged.reports["nan-lora_B-first"].findings}
    assert {"adapter-nonfinite", "merged-nonfinite"} <= checks


def test_every_report_names_its_files_with_digests(judged: Judged) -> None:
    report = judged.reports["plain"]
    assert {file.path for file in report.files} >= {"adapter_config.json", "adapter_model.safetensors"}
    for file in report.files:
        path = judged.adapters_directory / "plain" / file.path
        assert file.size_bytes == path.stat().st_size
        assert file.sha256 == judged.before[str(path)]
