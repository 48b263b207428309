"""What an adapter's files say decides whether PEFT may see it, whatever the configuration makes of the finding."""

from dataclasses import replace
from typing import Any

import pytest

from merge_gate.judging import adapter_report
from merge_gate.judging.bounds import MOST_CHARACTERS
from merge_gate.judging.checks.check import Check, Symptom
from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.not_judged import NOT_JUDGED, not_judged
from merge_gate.records.config import BaseSpec, CheckSetting, Expect
from merge_gate.records.files import (
    AdapterConfig,
    BaseFiles,
    DeclaredQuantization,
    Entry,
    HashedFile,
    Snapshot,
    StoredTensor,
)
from merge_gate.records.measured import BaseFacts, Forward, LayerDifference, TensorStats
from merge_gate.records.refusals import NotJudged
from merge_gate.records.report import AdapterReport, BaseReport, Coverage
from merge_gate.records.terms import BaseKey, FailureKind, Finding, ForwardMode, Origin, Quantization, Severity, Verdict
from tests.support.judging.cases import evidence, files, reason, spec
from tests.support.wording import Wording

NEVER_LOADED = ("file-missing", "file-lfs-pointer", "file-corrupt", "pickle-refused", "config-unsafe")


def entry(check: str, severity: Severity) -> Entry:
    found = Finding(check=check, severity=Severity.ERROR, message="m", hint="h", origin=Origin.FILE)
    chosen = spec(checks=(CheckSetting(check=check, severity=severity),))
    return Entry(spec=chosen, dtype="float32", members=(files(findings=(found,)),))


@pytest.mark.parametrize("severity", [Severity.WARNING, Severity.OFF])
@pytest.mark.parametrize("check", NEVER_LOADED)
def test_what_peft_must_not_see_is_not_loaded_at_any_severity(check: str, severity: Severity) -> None:
    report = adapter_report.blocked_report(entry(check, severity))
    assert (report.verdict, report.cause) == (Verdict.ERROR, NOT_JUDGED)
    assert any(check in finding.message for finding in report.findings if finding.check == NOT_JUDGED)


@pytest.mark.parametrize("check", ["config-invalid", "keys-missing", "shape-mismatch"])
def test_what_the_load_finds_again_may_load_if_it_is_no_error(check: str) -> None:
    assert adapter_report.blocked_report(entry(check, Severity.WARNING)) is None
    report = adapter_report.blocked_report(entry(check, Severity.ERROR))
    assert (report.verdict, report.cause) == (Verdict.FAILED, check)


@pytest.mark.parametrize(
    ("config", "base", "severity", "expected"),
    [
        (AdapterConfig(), None, Severity.ERROR, ["config-invalid"]),
        (AdapterConfig(), None, Severity.WARNING, ["not-judged", "config-invalid"]),
        (AdapterConfig(), "/models/base", Severity.ERROR, ["config-invalid", "not-judged"]),
        (AdapterConfig(digest="0" * 64), None, Severity.ERROR, ["config-invalid", "not-judged"]),
    ],
)
def test_a_config_that_cannot_be_read_is_not_blamed_for_its_base(config, base, severity, expected) -> None:
    bad = entry("config-invalid", severity)
    bad = replace(
        bad,
        spec=replace(bad.spec, base=BaseSpec(model=base)),
        members=(replace(bad.files, config=config),),
        problem=not_judged("no base to merge into", "name it"),
    )
    assert sorted(finding.check for finding in adapter_report.files_report(bad).findings) == sorted(expected)


def test_a_method_without_weights_is_named_before_a_load() -> None:
    tuned = files(config={"peft_type": "PROMPT_TUNING"})
    report = adapter_report.blocked_report(Entry(spec=spec(), dtype="bfloat16", members=(tuned,)))
    assert (report.cause, report.failure) == ("not-mergeable", FailureKind.NOT_MERGEABLE)
    assert report.findings[0].message.startswith("PROMPT_TUNING adds inputs")


def test_an_unexpected_adapter_is_merged_all_the_same() -> None:
    asked = Entry(spec=spec(expect=Expect(r=8)), dtype="bfloat16", members=(files(),))
    assert [finding.check for finding in adapter_report.files_report(asked).findings] == ["expectation-failed"]
    assert adapter_report.blocked_report(asked) is None


@pytest.mark.parametrize("version", ["0.21.2", None])
def test_the_release_that_saved_it_is_reported(version: str | None) -> None:
    member = files(config={"peft_version": version} if version else {})
    report = adapter_report.files_report(Entry(spec=spec(), dtype="bfloat16", members=(member,)))
    assert (report.peft_type, report.saved_by) == ("LORA", version)


@pytest.mark.parametrize("severity", list(Severity))
def test_a_forgotten_file_check_lets_nothing_be_loaded(severity: Severity, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that is not in the table, nor one whose row says nothing of loading."""
    cursed = entry("file-cursed", severity)
    assert adapter_report.blocked_report(cursed) is not None
    row = Check("file-cursed", Severity.ERROR, Origin.FILE, Symptom.BAD_FILE, blame=1, page="It is cursed.")
    for module in ("adapter_report", "all_checks"):
        monkeypatch.setattr(f"merge_gate.judging.{module}.CHECKS", {**CHECKS, row.id: row})
    assert adapter_report.blocked_report(cursed) is not None
    thought_about = {**CHECKS, row.id: replace(row, allows_loading=True)}
    monkeypatch.setattr("merge_gate.judging.adapter_report.CHECKS", thought_about)
    assert (adapter_report.blocked_report(cursed) is None) == (severity is not Severity.ERROR)


# --- the line of the report ------------------------------------------------------------------------------------------

HEADER = StoredTensor(name="x", dtype="F32", shape=(1,))
RECORD = HashedFile(path="adapter_model.safetensors", size_bytes=8, sha256="00")
MADE = BaseFacts(model="./b", revision="r1", dtype="float16", quantization=Quantization.BNB_4BIT)
SPEC = spec(name="n", source="./n", line=7, column=3, base=BaseSpec(model="/b", label="./b", revision="r0"))
ENTRY = Entry(
    spec=SPEC,
    dtype="bfloat16",
    members=(files(tensors=(HEADER, HEADER, HEADER), files=(RECORD,)),),
    revision="adapter-revision",
)
LINE = AdapterReport(
    name="n",
    source="./n",
    revision="adapter-revision",
    base=BaseKey(model="./b", revision="r0", dtype="bfloat16", quantization=Quantization.NONE),
    peft_type="LORA",
    verdict=Verdict.PASSED,
    cause=None,
    findings=(),
    coverage=Coverage(adapter_tensors=3),
    files=(RECORD,),
    seconds=0.0,
    line=7,
    column=3,
)
MEASURED = evidence(
    base=MADE, layers_in_blocks=4, layers_by_peft=2, cross_checked=("a", "b", "c"), seconds=1.5, seed=11,
    forward=Forward(ran=True, inputs="16 tokens", largest=3.0),
)  # fmt: skip
WHOLE = Coverage(
    adapter_tensors=2, applied=2, modules_merged=1, parameters_checked=64, layers_in_blocks=4, layers_by_peft=2,
    layers_witnessed=3, parameters_total=64,
)  # fmt: skip
NOW_ON = BaseKey(model="./b", revision="r1", dtype="float16", quantization=Quantization.BNB_4BIT)
TOLD = NotJudged(message="gone", hint="again", origin=Origin.BASE)
NOT_JUDGED_SO = Finding(check=NOT_JUDGED, severity=Severity.ERROR, message="gone", hint="again", origin=Origin.BASE)


def test_a_merged_adapter_in_full() -> None:
    assert adapter_report.merged_report(ENTRY, MEASURED) == replace(
        LINE, base=NOW_ON, coverage=WHOLE, seconds=1.5, seed=11, forward=MEASURED.forward, tensors=MEASURED.merges
    )


def test_a_model_that_was_not_run_costs_the_verdict_if_required(wording: Wording) -> None:
    why = "odd " * MOST_CHARACTERS
    not_run = replace(MEASURED, forward=Forward(why_not=why))
    for forward, expected in (
        (ForwardMode.AUTO, (Verdict.PASSED, None)),
        (ForwardMode.OFF, (Verdict.PASSED, None)),
        (ForwardMode.REQUIRED, (Verdict.ERROR, NOT_JUDGED)),
    ):
        asked = replace(ENTRY, spec=replace(SPEC, forward=forward))
        line = adapter_report.merged_report(asked, not_run)
        assert (line.verdict, line.cause) == expected
        assert line.forward.why_not is not None
        assert len(line.forward.why_not) < len(why), "its text is the adapter's, and bounded"
        assert adapter_report.merged_report(asked, MEASURED).verdict is Verdict.PASSED
        broken = replace(not_run, unexpected=("stray",))
        assert adapter_report.merged_report(asked, broken).verdict is Verdict.FAILED, "it is proven broken anyway"
        refused = replace(not_run, refusal=reason("layer_left_unmerged", module="m"))
        assert NOT_JUDGED not in {one.check for one in adapter_report.merged_report(asked, refused).findings}
    required = replace(ENTRY, spec=replace(SPEC, forward=ForwardMode.REQUIRED))
    unknown = replace(MEASURED, forward=Forward(why_not="the inputs are unknown"))
    wording(adapter_report.merged_report(required, unknown).findings[0])


def test_what_the_merge_did_not_use_is_not_counted_as_done() -> None:
    differing = tuple(f"l{number}" for number in range(12))
    one = replace(MEASURED, differing=differing, unexpected=("stray",))
    line = adapter_report.merged_report(ENTRY, one)
    assert line.coverage == replace(WHOLE, applied=1, layers_in_blocks=0, layers_differing=differing[:10])
    assert (line.verdict, line.cause) == (Verdict.FAILED, "keys-unexpected")
    refused = replace(MEASURED, refusal=reason("layer_left_unmerged", module="m"), merges=())
    assert adapter_report.merged_report(ENTRY, refused).coverage == replace(WHOLE, applied=0)


def test_a_layer_that_differs_is_not_proved() -> None:
    different = (LayerDifference(module="m", class_name="Linear", change_share=2.0, output_share=0.1),)
    compared = replace(MEASURED, forward=replace(MEASURED.forward, layers_compared=3))
    assert adapter_report.merged_report(ENTRY, compared).coverage.layers_proved == 3
    wrong = replace(compared, different=different)
    assert adapter_report.merged_report(ENTRY, wrong).coverage.layers_proved == 2


def test_an_adapter_that_was_not_judged_keeps_its_file_findings() -> None:
    found = Finding(check="config-invalid", severity=Severity.WARNING, message="m", hint="h", origin=Origin.FILE)
    asked = replace(ENTRY, members=(replace(ENTRY.files, findings=(found,)),))
    line = adapter_report.not_judged_report(asked, TOLD)
    expected = replace(LINE, verdict=Verdict.ERROR, cause=NOT_JUDGED, findings=(found, NOT_JUDGED_SO), decided_by=1)
    assert line == expected


def test_measurements_that_count_for_nothing_leave_only_that() -> None:
    expected = replace(LINE, verdict=Verdict.ERROR, cause=NOT_JUDGED, findings=(NOT_JUDGED_SO,), decided_by=0)
    assert adapter_report.withdrawn_report(ENTRY, TOLD) == expected


def test_files_alone_in_full() -> None:
    assert adapter_report.files_report(ENTRY) == LINE


PROBLEM = Finding(check=NOT_JUDGED, severity=Severity.ERROR, message="no such repository", origin=Origin.RUNTIME)


def test_an_adapter_that_was_not_found_says_that_alone() -> None:
    line = adapter_report.files_report(Entry(spec=replace(SPEC, expect=Expect(r=8)), dtype="bfloat16", problem=PROBLEM))
    assert (line.findings, line.peft_type, line.coverage) == ((PROBLEM,), None, Coverage())


def test_what_files_say_comes_before_what_else_is_wrong() -> None:
    found = Finding(check="file-corrupt", severity=Severity.ERROR, message="m", hint="h", origin=Origin.FILE)
    asked = Entry(spec=SPEC, dtype="bfloat16", members=(files(findings=(found,)),), problem=PROBLEM)
    assert adapter_report.files_report(asked).findings == (found, PROBLEM)
    assert adapter_report.files_report(asked).cause == "file-corrupt"


@pytest.mark.parametrize(
    ("base", "named", "expected"),
    [
        (BaseSpec(model="/b", label="./b"), "acme/b", "./b"),
        (BaseSpec(model="/b"), "acme/b", "/b"),
        (BaseSpec(), "acme/b", "acme/b"),
        (BaseSpec(), "x" * 3000, "x" * 2000 + "… (1,000 more)"),
        (BaseSpec(), None, None),
    ],
)
def test_the_base_is_called_as_it_was_asked_for(base: BaseSpec, named: str | None, expected: str | None) -> None:
    config = {"base_model_name_or_path": named, "peft_type": "y" * 3000}
    line = adapter_report.files_report(Entry(spec=spec(base=base), dtype="bfloat16", members=(files(config=config),)))
    assert (line.base.model, line.peft_type) == (expected, "y" * 2000 + "… (1,000 more)")


def test_what_is_not_loaded_says_why_and_what_to_do(wording: Wording) -> None:
    report = adapter_report.blocked_report(entry("file-corrupt", Severity.WARNING))
    lesser, why = report.findings
    assert (lesser.check, lesser.severity) == ("file-corrupt", Severity.WARNING)
    wording(why.message)
    assert why == Finding(
        check=NOT_JUDGED, severity=Severity.ERROR, message=why.message, hint="h", origin=Origin.RUNTIME
    )


def test_the_reason_of_an_undecided_entry_is_bounded() -> None:
    long = NotJudged(message="x" * 1_000_000)
    for report in (adapter_report.not_judged_report(ENTRY, long), adapter_report.withdrawn_report(ENTRY, long)):
        assert len(report.findings[0].message) < 10_000


def test_a_base_in_full() -> None:
    nan = TensorStats(name="norm.weight", dtype="float16", shape=(2,), numel=2, nan=1)
    kept: dict[str, Any] = {
        "parameters": 64,
        "loaded_as": "LlamaForCausalLM",
        "replaced": ("score.weight",),
        "dtypes": (("float16", 60.0), ("float32", 4.0)),
    }
    facts = replace(MADE, nonfinite=(nan,), **kept)
    line = adapter_report.base_report(facts)
    (found,) = line.findings
    assert (found.check, found.origin, found.nan) == ("base-nonfinite", Origin.BASE, 1)
    named = BaseReport(model="./b", revision="r1", dtype="float16", quantization=Quantization.BNB_4BIT)
    assert line == replace(named, findings=(found,), **kept)
    note = Finding(check="base-inconsistent", severity=Severity.NOTE, message="twice", origin=Origin.BASE)
    noted = adapter_report.base_report(facts, BaseFiles(directory="/base", notes=(note,)))
    assert noted == replace(line, findings=(*line.findings, note))
    whole = adapter_report.base_report(replace(facts, no_skeleton="its values are made by code " * 90))
    assert whole.no_skeleton.startswith("its values are made by code")
    assert len(whole.no_skeleton) == 400


def test_missing_parameters_come_before_values_that_are_infinite() -> None:
    nan = TensorStats(name="norm.weight", dtype="float16", shape=(2,), numel=2, nan=1)
    facts = replace(MADE, nonfinite=(nan,), incomplete=("head.weight",), unloaded=("a.weight", "b.weight"))
    found = adapter_report.base_report(facts).findings
    assert [(one.check, one.severity, one.tensor) for one in found] == [
        ("base-incomplete", Severity.ERROR, "head.weight"),
        ("base-inconsistent", Severity.NOTE, "a.weight"),
        ("base-nonfinite", Severity.ERROR, "norm.weight"),
    ]


# --- a base that was not loaded --------------------------------------------------------------------------------------

ASKED = BaseKey(model="./b", revision="r1", dtype="float16", quantization=Quantization.BNB_4BIT)
NOT_STORED = reason(
    "parameters_not_stored", base="./b", class_name="LlamaModel", names=("model.norm.weight",), read=("a",)
)


def of_base_file(check: str, message: str = "m") -> Finding:
    return Finding(check=check, severity=Severity.ERROR, message=message, hint="h", origin=Origin.BASE)


def test_a_base_that_was_not_loaded_is_the_one_asked_for() -> None:
    found = (of_base_file("base-inconsistent"), of_base_file("base-format"))
    line = adapter_report.unloaded_base_report(ASKED, found)
    assert line == BaseReport(
        model="./b", revision="r1", dtype="float16", quantization=Quantization.BNB_4BIT, findings=found
    )
    unnamed = adapter_report.unloaded_base_report(replace(ASKED, model=None), found)
    assert unnamed == replace(line, model="")


def test_a_base_that_its_load_refuses_has_a_line_with_the_reason() -> None:
    line = adapter_report.refused_base_report(ASKED, NOT_STORED)
    (found,) = line.findings
    assert (found.check, found.severity, found.tensor) == ("base-incomplete", Severity.ERROR, "model.norm.weight")
    assert line == adapter_report.unloaded_base_report(ASKED, (found,))
    long = replace(NOT_STORED, fields={**NOT_STORED.fields, "base": "x" * 3000})
    cut = adapter_report.refused_base_report(ASKED, long)
    assert len(cut.findings[0].message) < 2100
    assert adapter_report.refused_base_report(ASKED, TOLD) is None, "no fault of the base, so each adapter says it"


# --- what the base's files say of every adapter ----------------------------------------------------------------------

OF_DTYPE = of_base_file("base-format", "no dtype")
CONTRADICTION = of_base_file("base-inconsistent")
FP8 = DeclaredQuantization(method="fp8", file="config.json", key="quantization_config")
BASE_FILES = BaseFiles(directory="/b", quantization=FP8, auto_dtype=OF_DTYPE, findings=(CONTRADICTION,))


def at_b(base_files: BaseFiles) -> Snapshot:
    return Snapshot(name="./b", directory="/b", base_files=base_files)


QUANTIZED = spec(base=BaseSpec(model="/b", label="./b", quantization=Quantization.BNB_4BIT))
ON_BASE = Entry(spec=QUANTIZED, dtype="auto", members=(files(),), base=at_b(BASE_FILES))


def test_the_base_the_request_and_the_dtype_may_each_be_wrong() -> None:
    contradiction, of_request, of_dtype = adapter_report.base_findings(ON_BASE)
    assert (contradiction, of_dtype) == (CONTRADICTION, OF_DTYPE)
    assert (of_request.check, of_request.severity) == ("base-format", Severity.ERROR)
    for word in ("./b", "fp8", "bnb-4bit"):
        assert word in of_request.message


@pytest.mark.parametrize(("dtype", "expected"), [("auto", (OF_DTYPE,)), ("float32", ()), ("bfloat16", ())])
def test_what_keeps_a_base_from_its_own_dtype_keeps_no_other(dtype: str, expected: tuple[Finding, ...]) -> None:
    plain = BaseFiles(directory="/b", auto_dtype=OF_DTYPE)
    assert adapter_report.base_findings(Entry(spec=SPEC, dtype=dtype, base=at_b(plain))) == expected
    sound = at_b(BaseFiles(directory="/b"))
    assert adapter_report.base_findings(Entry(spec=SPEC, dtype=dtype, base=sound)) == ()
    assert adapter_report.base_findings(Entry(spec=SPEC, dtype=dtype)) == (), "its files were not read"


def test_findings_of_a_base_are_bounded() -> None:
    many = tuple(of_base_file("base-inconsistent", f"m{number}") for number in range(105))
    found = adapter_report.base_findings(
        Entry(spec=SPEC, dtype="auto", base=at_b(BaseFiles(directory="/b", findings=many)))
    )
    assert found[:-1] == many[:100]
    assert found[-1].measured == (("more", 5.0),)


def test_without_its_base_an_adapter_is_not_judged() -> None:
    """It is said after all that its own files say."""
    warning = Finding(check="config-invalid", severity=Severity.WARNING, message="m", hint="h", origin=Origin.FILE)
    asked = replace(
        ON_BASE,
        members=(files(findings=(warning,)),),
        problem=PROBLEM,
        base=at_b(replace(BASE_FILES, quantization=None)),
    )
    report = adapter_report.blocked_report(asked)
    assert report.findings == (warning, PROBLEM, CONTRADICTION, OF_DTYPE)
    assert (report.verdict, report.cause, report.decided_by) == (Verdict.ERROR, "base-inconsistent", 2)
