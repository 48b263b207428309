"""Findings and coverage → verdict: nothing vacuous passes, and nothing that is not finite, whatever the settings."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_gate.judging.all_checks import judge_merge
from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.not_judged import NOT_JUDGED, not_judged
from merge_gate.judging.verdict import decide, with_decision
from merge_gate.records.config import CheckSetting
from merge_gate.records.measured import Evidence, FileTensor, TensorMerge, TensorStats
from merge_gate.records.refusals import NotJudged
from merge_gate.records.report import Coverage
from merge_gate.records.terms import Finding, Origin, Severity, Verdict
from tests.support.judging.cases import base, files, reason, spec
from tests.support.properties import examples
from tests.support.reports import FAILED, PASSED
from tests.support.wording import Wording

WHOLE = Coverage(adapter_tensors=2, applied=2, modules_merged=1, parameters_checked=64, parameters_total=64)


def finding(check: str, severity: Severity = Severity.ERROR) -> Finding:
    return Finding(check=check, severity=severity, message="m", hint="h", origin=Origin.ADAPTER)


def decided(findings: tuple[Finding, ...], coverage: Coverage) -> tuple[Verdict, str | None, tuple[Finding, ...]]:
    """The verdict, the check that decided it, and the findings."""
    verdict, index, findings = decide(findings, coverage)
    return verdict, None if index is None else findings[index].check, findings


def of_merge(origin: Origin) -> Finding:
    return dataclasses.replace(finding("merged-nonfinite"), origin=origin)


WARNING, NOTE, BROKEN_BASE = (
    finding("headroom", Severity.WARNING), finding("base-mismatch", Severity.NOTE), finding("base-incomplete"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("found", "verdict", "cause"),
    [
        ((), Verdict.PASSED, None),
        ((WARNING, NOTE), Verdict.PASSED, None),
        ((finding("adapter-nonfinite"), finding("merged-nonfinite"), WARNING), Verdict.FAILED, "adapter-nonfinite"),
        ((WARNING, finding("no-effect")), Verdict.FAILED, "no-effect"),
        ((not_judged("out of memory"),), Verdict.ERROR, NOT_JUDGED),
        ((BROKEN_BASE, finding("file-corrupt")), Verdict.FAILED, "file-corrupt"),
        ((BROKEN_BASE, of_merge(Origin.MERGE)), Verdict.ERROR, "base-incomplete"),
        ((BROKEN_BASE, of_merge(Origin.BASE)), Verdict.ERROR, "base-incomplete"),
    ],
)
def test_the_first_error_that_is_the_adapters_decides(found, verdict, cause) -> None:
    assert decided(found, WHOLE) == (verdict, cause, found)


@pytest.mark.parametrize("first", [True, False])
def test_a_proven_failure_outranks_what_could_not_be_judged(first: bool) -> None:
    found = (not_judged("out of memory"), finding("no-effect"))
    assert decided(found if first else found[::-1], WHOLE)[:2] == (Verdict.FAILED, "no-effect")


@pytest.mark.parametrize("check", ["base-incomplete", "base-inconsistent", "base-format"])
def test_an_error_of_the_base_is_not_the_adapters_failure(check: str) -> None:
    found = (finding(check),)
    assert decided(found, WHOLE) == (Verdict.ERROR, check, found)
    assert decided((not_judged("x"), *found), WHOLE)[:2] == (Verdict.ERROR, check)


@pytest.mark.parametrize(
    "coverage",
    [
        Coverage(),
        Coverage(modules_merged=1),
        Coverage(modules_merged=1, parameters_checked=63, parameters_total=64),
        Coverage(modules_merged=1, parameters_checked=65, parameters_total=64),
        Coverage(modules_merged=1, parameters_checked=0, parameters_total=64),
        Coverage(modules_merged=0, parameters_checked=64, parameters_total=64),
    ],
)
def test_nothing_vacuous_passes(coverage: Coverage, wording: Wording) -> None:
    verdict, cause, found = decided((finding("headroom", Severity.WARNING),), coverage)
    assert (verdict, cause) == (Verdict.ERROR, NOT_JUDGED)
    wording(found[0])


def test_a_gap_is_told_in_full_and_before_the_warnings() -> None:
    warned = finding("headroom", Severity.WARNING)
    coverage = Coverage(modules_merged=1, parameters_checked=1_000, parameters_total=1_100_048_384)
    _, _, (gap, *others) = decided((warned,), coverage)
    assert {"1,000", "1,100,048,384"} <= set(gap.message.split())
    assert others == [warned]


def test_nothing_at_all_is_told_without_a_warning_too(wording: Wording) -> None:
    for coverage in (Coverage(), Coverage(parameters_checked=64, parameters_total=64)):
        (finding,) = decided((), coverage)[2]
        wording(finding)


WARNED, FIRST, SECOND = finding("headroom", Severity.WARNING), finding("file-corrupt"), finding("no-effect")


@pytest.mark.parametrize(
    ("cause", "findings", "index"),
    [
        pytest.param("no-effect", (WARNED, FIRST, SECOND, SECOND), 2, id="the first error of the cause"),
        pytest.param("headroom", (WARNED, FIRST, SECOND), 1, id="the first error if the cause is only a warning"),
        pytest.param("headroom", (WARNED, WARNED), 0, id="the first finding if none is an error"),
        pytest.param("no-effect", (), None, id="none of none"),
    ],
)
def test_the_finding_that_decided_follows_from_the_cause(cause, findings, index) -> None:
    read = dataclasses.replace(FAILED, cause=cause, findings=findings, decided_by=None)
    assert with_decision(read) == dataclasses.replace(read, decided_by=index)


def test_no_finding_decided_that_an_adapter_passes() -> None:
    read = dataclasses.replace(PASSED, findings=(WARNED,))
    assert with_decision(read) == read


NAMES = ("model.norm.weight", "model.layers.0.q_proj.weight", "lm_head.weight")
counts = st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2))


@st.composite
def tensors(draw: st.DrawFn, name: str | None = None) -> TensorStats:
    nan, posinf, neginf = draw(counts)
    return TensorStats(
        name=name or draw(st.sampled_from(NAMES)),
        dtype="float16",
        shape=(64,),
        numel=64,
        minimum=-1.0,
        maximum=draw(st.sampled_from([0.0, 1.0, 65504.0])),
        nan=nan,
        posinf=posinf,
        neginf=neginf,
        first_index=(0,) if nan + posinf + neginf else None,
    )


@st.composite
def merges(draw: st.DrawFn) -> TensorMerge:
    stats = draw(tensors())
    norm = st.none() | st.floats(0, 1e9) | st.just(float("inf")) | st.just(float("nan"))
    return TensorMerge(
        module=stats.name.rpartition(".")[0],
        stats=stats,
        dtype_max=65504.0,
        changed=draw(st.booleans()),
        base_norm=draw(norm),
        delta_norm=draw(norm),
        lost_norm=draw(norm),
        unchanged_fraction=draw(st.none() | st.floats(0, 1)),
    )


check_settings = st.lists(
    st.builds(
        CheckSetting,
        check=st.sampled_from(list(CHECKS)),
        severity=st.sampled_from([Severity.ERROR, Severity.WARNING, Severity.OFF]),
        limit=st.none() | st.floats(0.01, 1e6),
    ),
    unique_by=lambda one: one.check,
).map(tuple)
refusals = st.sampled_from(
    [
        NotJudged(message="m"),
        reason("pattern_refused", pattern=None, names=9, seconds=1.0),
        reason("shape_clash", name="lora_B", got=(2,), expected=(3,)),
        reason("targets_not_found", targets=("query",), of_base=("q_proj",)),
        reason("layer_left_unmerged", module="m"),
    ]
)
evidences = st.builds(
    Evidence,
    base=st.lists(tensors(), max_size=2).map(
        lambda found: base(nonfinite=tuple(one for one in found if not one.finite))
    ),
    file_tensors=st.lists(st.builds(FileTensor, stats=tensors("lora_B"), used=st.booleans()), max_size=2).map(tuple),
    missing=st.lists(st.just("lora_A.weight"), max_size=1).map(tuple),
    unexpected=st.lists(st.just("stray"), max_size=1).map(tuple),
    targeted=st.lists(st.sampled_from(["model.layers.0.q_proj", "lm_head"]), unique=True).map(tuple),
    merges=st.lists(merges(), max_size=3).map(tuple),
    tied=st.lists(st.just(("lm_head.weight", "embed")), max_size=1).map(tuple),
    refused_by_safe_merge=st.lists(st.just("lm_head"), max_size=1).map(tuple),
    refusal=st.none() | refusals,
    parameters_checked=st.sampled_from([0, 63, 64]),
    parameters_total=st.sampled_from([0, 64]),
)  # fmt: skip


def coverage_of(evidence: Evidence) -> Coverage:
    return Coverage(
        modules_merged=len(evidence.targeted),
        parameters_checked=evidence.parameters_checked,
        parameters_total=evidence.parameters_total,
    )


@settings(max_examples=examples(500), deadline=None)
@given(evidences, check_settings)
def test_what_is_not_finite_never_passes(evidence: Evidence, chosen: tuple[CheckSetting, ...]) -> None:
    found = judge_merge(spec(checks=chosen), files(), evidence)
    verdict, cause, found = decided(found, coverage_of(evidence))
    broken = not all(merge.stats.finite for merge in evidence.merges) or bool(evidence.base.nonfinite)
    if broken:
        assert verdict is Verdict.FAILED
    if evidence.refusal is not None and evidence.parameters_checked != evidence.parameters_total:
        assert verdict is not Verdict.PASSED
    if verdict is Verdict.PASSED:
        assert cause is None
        assert evidence.targeted
        assert evidence.parameters_checked == evidence.parameters_total > 0
        assert not [one for one in found if one.severity is Severity.ERROR]
    else:
        assert cause in {one.check for one in found if one.severity is Severity.ERROR}
    assert all(one.message for one in found)


@settings(max_examples=examples(100), deadline=None)
@given(evidences)
def test_what_is_not_finite_is_an_error_by_default(evidence: Evidence) -> None:
    used = [one.stats for one in evidence.file_tensors if one.used]
    if any(not stats.finite for stats in used):
        verdict, _, _ = decided(judge_merge(spec(), files(), evidence), coverage_of(evidence))
        assert verdict is Verdict.FAILED
