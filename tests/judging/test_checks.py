"""Each check by itself, without torch: when it fires, what it says, what its settings do, and who is blamed."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import TYPE_CHECKING, Any

import pytest

from merge_gate.judging.all_checks import measure_options
from merge_gate.judging.checks.base_nonfinite import of_base
from merge_gate.judging.checks.check import Check, FileCase, Symptom
from merge_gate.judging.checks.delta_norm import WIPED_SHARE
from merge_gate.judging.checks.phrases import describe_nonfinite
from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.not_judged import NOT_JUDGED, accident, not_judged
from merge_gate.records.config import AdapterSpec, CheckSetting, Combine, Expect
from merge_gate.records.files import AdapterConfig, AdapterFiles
from merge_gate.records.measured import (
    Evidence,
    FileTensor,
    MeasureOptions,
    TensorMerge,
    TensorStats,
)
from merge_gate.records.refusals import NotJudged
from merge_gate.records.terms import Finding, Origin, Severity
from tests.support.judging.cases import (
    ALL,
    DIGEST,
    FIRES,
    FOURIERFT,
    HALF_MAX,
    LARGE,
    LOKR,
    LORA_A,
    LORA_B,
    MODULE,
    NAMED,
    WEIGHT,
    Fire,
    base,
    broken,
    evidence,
    files,
    found_in_files,
    judge,
    lossy,
    merged,
    reason,
    spec,
    tensor,
    unread,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.wording import Wording


def with_settings(one: AdapterSpec, *settings: CheckSetting) -> AdapterSpec:
    return dataclasses.replace(one, checks=settings)


def judged(fire: Fire, *settings: CheckSetting) -> tuple[Finding, ...]:
    return judge(with_settings(fire.spec, *settings), fire.files, fire.evidence)


def small(share: float) -> TensorMerge:
    """A merged tensor whose norm is at most this share of the base's: 64 values."""
    most = 2.0 * share / math.sqrt(64)
    return merged(tensor(minimum=-most, maximum=most), base_norm=2.0, delta_norm=2.0)


ZERO = FileTensor(stats=tensor(LORA_A, minimum=0.0, maximum=0.0))


def of(check: str, findings: tuple[Finding, ...]) -> list[Finding]:
    return [finding for finding in findings if finding.check == check]


# --- when each fires, and what it says -------------------------------------------------------------------------------


def test_every_check_has_a_case_that_fires_it() -> None:
    assert list(FIRES) == list(CHECKS)


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


@pytest.mark.parametrize(("check", "fire"), ALL)
def test_a_check_fires_alone_and_names_its_place(check: str, fire: Fire) -> None:
    findings = judged(fire)
    assert {finding.check for finding in findings} == {check}
    (finding,) = findings
    assert finding.severity == (fire.severity or CHECKS[check].severity)
    assert finding.origin is fire.origin
    assert finding.hint
    for name in fire.names:
        assert name in finding.message, finding.message
    for name, value in fire.places.items():
        assert getattr(finding, name) == value, name


@pytest.mark.parametrize(("check", "fire"), ALL)
def test_what_it_says_is_a_sentence(check: str, fire: Fire) -> None:
    """On one line, without a plural of one and without a figure that is none."""
    (finding,) = judged(fire)
    for text in (finding.message, finding.hint):
        assert text == " ".join(text.split())
        assert not re.search(r"\b1 (more |targeted )?(tensors|modules|values)\b", text), text
        assert not re.search(r"\b(nan|inf)\b", text), text
        assert not text.endswith(".")


@pytest.mark.parametrize(
    ("check", "evidence_", "files_", "spec_"),
    [
        ("base-mismatch", evidence(), files(config={"base_model_name_or_path": "acme/Llama"}), spec(base=NAMED)),
        (
            "base-mismatch",
            evidence(),
            files(config={"base_model_name_or_path": "C:\\models\\llama\\"}),
            spec(base=NAMED),
        ),
        ("base-mismatch", evidence(), files(config={"base_model_name_or_path": "acme/mistral"}), spec()),
        (
            "base-mismatch",
            evidence(),
            files(config={"base_model_name_or_path": "acme/mistral"}),
            spec(base=NAMED, expect=Expect(base="acme/mistral")),
        ),
        (
            "base-mismatch",
            evidence(),
            files(config={"base_model_name_or_path": "Acme/Mistral"}),
            spec(base=dataclasses.replace(NAMED, names=("acme/phi", "acme/mistral"))),
        ),
        ("base-mismatch", evidence(), files(), spec(base=NAMED)),
        (
            "base-mismatch",
            evidence(base=base(revision="v1")),
            files(config={"base_model_name_or_path": "llama", "revision": "v1"}),
            spec(base=NAMED),
        ),
        ("expectation-failed", evidence(), files(), spec(expect=Expect(r=16, lora_alpha=32.0, peft_type="LORA"))),
        (
            "expectation-failed",
            evidence(),
            files(),
            spec(expect=Expect(sha256=(("adapter_model.safetensors", DIGEST.upper()),))),
        ),
        ("merged-nonfinite", evidence(merges=(merged(broken()),), base=base(nonfinite=(broken(),))), files(), spec()),
        ("no-effect", evidence(targeted=("lm", MODULE), merges=(merged(), merged(module="lm.head"))), files(), spec()),
        ("no-effect", evidence(refusal=reason("layer_left_unmerged", module="m"), merges=()), files(), spec()),
        ("no-effect", evidence(targeted=("lm_head", MODULE), shared=(("lm_head", MODULE),)), files(), spec()),
        ("rounding-loss", evidence(merges=(lossy(0.5),)), files(), spec()),
        ("rounding-loss", evidence(merges=(lossy(0.9), lossy(0.1), LARGE, LARGE)), files(), spec()),
        ("rounding-loss", evidence(merges=(lossy(0.9), lossy(0.9), LARGE, LARGE)), files(), spec()),
        ("rounding-loss", evidence(merges=(merged(lost_norm=1.0, delta_norm=0.0),)), files(), spec()),
        ("rounding-loss", evidence(merges=(merged(lost_norm=math.inf, delta_norm=1.0),)), files(), spec()),
        ("headroom", evidence(merges=(merged(tensor(maximum=HALF_MAX / 2)),)), files(), spec()),
        ("headroom", evidence(merges=(merged(tensor(maximum=6e4), changed=False),)), files(), spec()),
        ("headroom", evidence(merges=(merged(tensor(maximum=9e9), dtype_max=math.inf),)), files(), spec()),
        ("headroom", evidence(merges=(merged(broken()),), refused_by_safe_merge=(MODULE,)), files(), spec()),
        ("delta-norm", evidence(merges=(merged(base_norm=1.0, delta_norm=10.0),)), files(), spec()),
        ("delta-norm", evidence(merges=(merged(base_norm=0.0, delta_norm=10.0),)), files(), spec()),
        ("delta-norm", evidence(merges=(small(1.01 * WIPED_SHARE),)), files(), spec()),
        ("delta-norm", evidence(file_tensors=(ZERO,), merges=(merged(changed=False),)), files(), spec()),
        ("not-reproducible", evidence(), files(config={"init_lora_weights": "pissa"}), spec()),
        ("not-reproducible", evidence(), files(config={"init_lora_weights": True}), spec()),
        ("meaning-changed", evidence(), files(config=LOKR | {"r": 2, "alpha": 2}), spec()),
    ],
)  # fmt: skip
def test_a_check_keeps_quiet(check: str, evidence_: Evidence, files_: AdapterFiles, spec_: AdapterSpec) -> None:
    assert of(check, judge(spec_, files_, evidence_)) == []


def test_a_module_that_shares_an_unchanged_tensor_is_unchanged_too() -> None:
    sharing = evidence(targeted=("lm_head", MODULE), shared=(("lm_head", "model.embed_tokens"),))
    (finding,) = judge(spec(), files(), sharing)
    assert (finding.check, finding.severity, finding.module) == ("no-effect", Severity.WARNING, "lm_head")


def test_a_weight_that_keeps_less_than_float32_rounds_away_is_wiped_out() -> None:
    (finding,) = judge(spec(), files(), evidence(merges=(small(WIPED_SHARE),)))
    assert (finding.check, finding.tensor) == ("delta-norm", WEIGHT)


def test_a_long_list_of_names_is_cut() -> None:
    (finding,) = judge(spec(), files(), evidence(unexpected=tuple(f"stray.{i}" for i in range(1000))))
    assert {"1,000", "997"} <= set(finding.message.split())
    assert len(finding.message) < 400


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


def test_expected_and_found_values_differ_to_the_last_digit() -> None:
    config = files(config={"lora_alpha": 1_000_000})
    (finding,) = judge(spec(expect=Expect(lora_alpha=1_000_001.0)), config, evidence())
    assert {"expect.lora_alpha", "1000001.0,", "1e+06"} <= set(finding.message.split())


def test_an_unread_layer_has_the_same_message_in_several_dtypes() -> None:
    """What it says is the same, so that it is said once, although the figures differ."""
    told = [
        judge(spec(), files(config=FOURIERFT), evidence(peft_type="FOURIERFT", unread=(unread(share=share),)))
        for share in (6.8123, 6.8119)
    ]
    assert told[0] == told[1] != ()


def test_the_base_has_findings_of_its_own() -> None:
    (finding,) = of_base(base(model="acme/llama", nonfinite=(broken("model.norm.weight"),)))
    assert (finding.check, finding.origin, finding.tensor) == ("base-nonfinite", Origin.BASE, "model.norm.weight")


def test_a_replaced_tensor_of_the_base_hides_no_other() -> None:
    tensors = tuple(broken(f"{name}.weight") for name in ("lm_head", "model.norm"))
    replaced, other = of_base(base(nonfinite=tensors), ("lm_head.weight",))
    assert (replaced.severity, replaced.tensor) == (Severity.WARNING, "lm_head.weight")
    assert (other.severity, other.tensor) == (Severity.ERROR, "model.norm.weight")


def test_a_combination_without_effect_is_due_to_its_weights(wording: Wording) -> None:
    combine = Combine(method="cat", adapters=("a", "b"), weights=(1.0, -1.0))
    one = evidence(merges=(merged(changed=False),))
    (finding,) = judge(spec(combine=combine), files(), one)
    assert finding.check == "no-effect"
    assert "weights" in finding.hint
    wording(finding.hint)


# --- settings --------------------------------------------------------------------------------------------------------


def setting(check: str, severity: Severity, limit: float | None = None) -> CheckSetting:
    return CheckSetting(check=check, severity=severity, limit=limit)


@pytest.mark.parametrize(("check", "fire"), ALL)
@pytest.mark.parametrize("severity", [Severity.ERROR, Severity.WARNING, Severity.OFF])
def test_severity_is_what_the_config_says(check: str, fire: Fire, severity: Severity) -> None:
    findings = judged(fire, setting(check, severity))
    default = CHECKS[check]
    if not default.can_be_off:
        assert [finding.severity for finding in findings] == [fire.severity or Severity.ERROR]
    elif fire.severity is Severity.NOTE:
        assert [finding.severity for finding in findings] == [Severity.NOTE]
    elif severity is Severity.OFF:
        assert findings == ()
    elif fire.severity is Severity.WARNING:  # the lesser case of a check stays one
        assert [finding.severity for finding in findings] == [Severity.WARNING]
    else:
        assert [finding.severity for finding in findings] == [severity]


@pytest.mark.parametrize("severity", [Severity.ERROR, Severity.WARNING, Severity.OFF])
def test_a_note_stays_a_note(severity: Severity) -> None:
    note = Finding(check="base-mismatch", severity=Severity.NOTE, message="a path", origin=Origin.CONFIG)
    chosen = with_settings(spec(), setting("base-mismatch", severity))
    assert judge(chosen, files(findings=(note,)), None) == (note,)


def test_notes_come_last() -> None:
    note = Finding(check="base-inconsistent", severity=Severity.NOTE, message="more", origin=Origin.BASE)
    fire = FIRES["base-mismatch"][0]
    noted = dataclasses.replace(fire.files, findings=(note,))
    findings = judge(fire.spec, noted, evidence(merges=(merged(broken()),)))
    assert [finding.check for finding in findings] == ["merged-nonfinite", "base-mismatch", "base-inconsistent"]


def test_only_the_base_and_what_is_not_finite_cannot_be_switched_off() -> None:
    assert {check for check, default in CHECKS.items() if not default.can_be_off} == {
        "base-incomplete",
        "base-inconsistent",
        "base-format",
        "base-nonfinite",
        "merged-nonfinite",
    }


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


@pytest.mark.attempt("M11", "delta-norm above its error-limit, in JSON and SARIF", "both limits are there")
@pytest.mark.parametrize(
    ("settings", "ratio", "shape", "severity"),
    [
        ((), 1000.0, (8, 8), Severity.WARNING),
        ((), 1001.0, (8, 8), Severity.ERROR),
        ((), 1001.0, (64,), Severity.WARNING),
        (
            (CheckSetting(check="delta-norm", severity=Severity.WARNING, limit=10.0, error_limit=20.0),),
            21.0,
            (8, 8),
            Severity.ERROR,
        ),
        (
            (CheckSetting(check="delta-norm", severity=Severity.WARNING, limit=10.0, error_limit=1e6),),
            5000.0,
            (8, 8),
            Severity.WARNING,
        ),
        (
            (CheckSetting(check="delta-norm", severity=Severity.WARNING, limit=2000.0),),
            5000.0,
            (8, 8),
            Severity.WARNING,
        ),
        ((CheckSetting(check="delta-norm", severity=Severity.ERROR, limit=10.0),), 11.0, (8, 8), Severity.ERROR),
        ((CheckSetting(check="delta-norm", severity=Severity.OFF, limit=10.0, error_limit=20.0),), 1e9, (8, 8), None),
    ],
)
def test_a_delta_above_the_error_limit_fails(
    settings: tuple[CheckSetting, ...], ratio: float, shape: tuple[int, ...], severity: Severity | None
) -> None:
    merge = merged(dataclasses.replace(tensor(), shape=shape), base_norm=1.0, delta_norm=ratio)
    found = of("delta-norm", judge(with_settings(spec(), *settings), files(), evidence(merges=(merge,))))
    assert [finding.severity for finding in found] == ([severity] if severity else [])
    # A program sees the limit that the message names.
    assert [("error-limit" in finding.message) for finding in found] == [
        "error_limit" in dict(finding.measured) for finding in found
    ]


def test_a_bias_above_the_error_limit_does_not_fail_a_matrix_below_it() -> None:
    bias = merged(dataclasses.replace(tensor(), shape=(64,)), base_norm=1.0, delta_norm=5000.0)
    matrix = merged(dataclasses.replace(tensor(), shape=(8, 8)), base_norm=1.0, delta_norm=20.0)
    (finding,) = of("delta-norm", judge(spec(), files(), evidence(merges=(bias, matrix))))
    assert finding.severity is Severity.WARNING


@pytest.mark.attempt("D01", "a good adapter on a weight that is nearly zero", "delta-norm warns")
@pytest.mark.parametrize(
    ("weight", "typical", "delta", "severity", "ratio"),
    [
        (1e-8, 1.0, 1.6, Severity.WARNING, 1.6e8),
        (1e-8, 1.0, 999.0, Severity.WARNING, 999e8),
        (1e-8, 1.0, 1001.0, Severity.ERROR, 1001),
        (1e-8, 1e-8, 1.6, Severity.ERROR, 1.6e8),
        (1.0, 1.0, 1e6, Severity.ERROR, 1e6),
        (1.0, 1e-3, 1e6, Severity.ERROR, 1e6),
        (0.0, 1.0, 1001.0, Severity.ERROR, 1001),
        (0.0, 1.0, 999.0, None, None),
    ],
)
def test_a_delta_is_compared_with_the_typical_weight_of_the_model_too(
    weight: float, typical: float, delta: float, severity: Severity | None, ratio: float | None
) -> None:
    """All are RMS; the matrix has 64 values, so that its norms are 8 times as large."""
    shape = dataclasses.replace(tensor(), shape=(8, 8), numel=64)
    merge = merged(shape, base_norm=8 * weight, delta_norm=8 * delta)
    found = of("delta-norm", judge(spec(), files(), evidence(merges=(merge,), typical_rms=typical)))
    assert [finding.severity for finding in found] == ([severity] if severity else [])
    assert [dict(finding.measured)["ratio"] for finding in found] == ([pytest.approx(ratio)] if ratio else [])


def test_the_matrix_that_fails_is_named_and_not_a_smaller_weight_with_a_larger_ratio() -> None:
    shape = dataclasses.replace(tensor(), shape=(8, 8), numel=64)
    tiny = merged(shape, base_norm=1e-9, delta_norm=1.0)
    exploded = merged(dataclasses.replace(shape, name="b.weight"), base_norm=1.0, delta_norm=1e6)
    (finding,) = of("delta-norm", judge(spec(), files(), evidence(merges=(tiny, exploded), typical_rms=1 / 8)))
    assert (finding.severity, finding.tensor) == (Severity.ERROR, "b.weight")


def test_a_weight_of_zeros_has_no_ratio_to_warn_by() -> None:
    merge = merged(dataclasses.replace(tensor(), shape=(8, 8)), base_norm=0.0, delta_norm=1e9)
    assert not of("delta-norm", judge(spec(), files(), evidence(merges=(merge,))))


@pytest.mark.parametrize(
    ("error_limit", "severity"), [(None, Severity.WARNING), (0.9, Severity.ERROR), (0.99, Severity.WARNING)]
)
def test_rounding_fails_only_where_the_config_says_so(error_limit: float | None, severity: Severity) -> None:
    chosen = with_settings(
        spec(), CheckSetting(check="rounding-loss", severity=Severity.WARNING, limit=0.5, error_limit=error_limit)
    )
    (finding,) = of("rounding-loss", judge(chosen, files(), evidence(merges=(lossy(0.95),))))
    assert finding.severity is severity
    assert ("error_limit" in dict(finding.measured)) is (severity is Severity.ERROR)


# --- blame -----------------------------------------------------------------------------------------------------------


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


def test_errors_come_before_warnings() -> None:
    fire = FIRES["base-mismatch"][0]
    findings = judge(fire.spec, fire.files, evidence(merges=(merged(broken()),)))
    assert [finding.check for finding in findings] == ["merged-nonfinite", "base-mismatch"]


def test_another_base_is_named_beside_refused_files() -> None:
    cut = Finding(check="file-corrupt", severity=Severity.ERROR, message="cut", hint="", origin=Origin.FILE)
    fire = FIRES["base-mismatch"][0]
    findings = judge(fire.spec, dataclasses.replace(fire.files, findings=(cut,)), None)
    assert [finding.check for finding in findings] == ["file-corrupt", "base-mismatch"]


def test_a_tensor_that_was_broken_in_the_base_is_not_the_mergers_fault() -> None:
    both = evidence(base=base(nonfinite=(broken(),)), merges=(merged(broken()), merged(broken("other.weight"))))
    findings = judge(spec(), files(), both)
    assert [(finding.check, finding.tensor) for finding in findings] == [
        ("base-nonfinite", WEIGHT),
        ("merged-nonfinite", "other.weight"),
    ]


def test_what_the_gate_could_not_do_is_no_check() -> None:
    out_of_memory = NotJudged(message="out of memory", hint="a larger machine")
    (finding,) = judge(spec(), files(), evidence(refusal=out_of_memory, merges=()))
    assert finding == not_judged("out of memory", "a larger machine")
    assert finding.check == NOT_JUDGED not in CHECKS
    assert not_judged("out of memory").hint == ""


def test_an_adapter_config_that_is_none_is_no_crash() -> None:
    judge(spec(expect=Expect(r=8)), dataclasses.replace(files(), config=AdapterConfig()), evidence())


@pytest.mark.parametrize("key", [one.name for one in dataclasses.fields(Expect) if one.name != "sha256"])
def test_whatever_can_be_expected_is_compared(key: str) -> None:
    (finding,) = judge(spec(expect=Expect(**{key: "another"})), files(), evidence())
    assert (finding.check, f"expect.{key}" in finding.message) == ("expectation-failed", True)


@pytest.mark.parametrize("value", [None, [], {}, "16", 16.5, 1 << 80])
def test_odd_values_in_an_adapter_config_are_no_crash(value: Any) -> None:
    config = {"r": value, "lora_alpha": value, "peft_type": value, "init_lora_weights": value}
    findings = judge(spec(expect=Expect(r=8)), files(config=config), evidence())
    assert [finding.check for finding in findings] == ["expectation-failed"]


def test_a_combination_is_judged_like_one_adapter() -> None:
    combination = spec(combine=Combine(method="ties", adapters=("a", "b"), weights=(1.0, 1.0), density=0.5))
    (finding,) = judge(combination, files(), evidence(merges=(merged(broken()),)))
    assert finding.check == "merged-nonfinite"


# --- hints that fit the case -----------------------------------------------------------------------------------------


def hint_of(check: str, one: Evidence) -> str:
    (finding,) = of(check, judge(spec(), files(), one))
    return finding.hint


def test_a_merge_that_only_carries_on_the_adapters_nan_points_to_it() -> None:
    sick = evidence(file_tensors=(FileTensor(stats=broken(LORA_B)),), merges=(merged(broken()),))
    assert "adapter-nonfinite" in hint_of("merged-nonfinite", sick)
    unused = evidence(file_tensors=(FileTensor(stats=broken(LORA_B), used=False),), merges=(merged(broken()),))
    assert "adapter-nonfinite" not in hint_of("merged-nonfinite", unused)


def test_an_overflow_is_not_sent_to_the_dtype_that_it_happened_in() -> None:
    wide = tensor(dtype="bfloat16", posinf=1, first_index=(0, 0))
    hint = hint_of("merged-nonfinite", evidence(merges=(merged(wide, dtype_max=3.4e38),)))
    assert "serve" not in hint
    assert "lora_alpha" in hint


def test_a_module_whose_rank_adalora_has_pruned_away_is_not_idle() -> None:
    gone = "model.layers.6.self_attn.q_proj"
    pruned = FileTensor(stats=tensor(f"base_model.model.{gone}.lora_A", shape=(0, 8), numel=0))
    adapter = evidence(peft_type="ADALORA", targeted=(MODULE, gone), file_tensors=(pruned,))
    assert not of("no-effect", judge(spec(), files(), adapter))
    assert of("no-effect", judge(spec(), files(), dataclasses.replace(adapter, peft_type="LORA")))


def test_a_merge_without_effect_for_want_of_tensors_points_to_them() -> None:
    lost = evidence(missing=(LORA_A, LORA_B), merges=(merged(changed=False),))
    assert "keys-missing" in hint_of("no-effect", lost)
    assert "keys-missing" not in hint_of("no-effect", evidence(merges=(merged(changed=False),)))


@pytest.mark.parametrize("severity", [Severity.ERROR, Severity.OFF])
def test_a_check_that_crashes_hides_no_other(severity: Severity, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is switched off stays off."""

    def crash(_: object) -> Iterator[Finding]:
        raise ZeroDivisionError("no weights, no norm")

    monkeypatch.setattr(
        "merge_gate.judging.all_checks.CHECKS",
        {**CHECKS, "delta-norm": dataclasses.replace(CHECKS["delta-norm"], of_files=crash)},
    )
    findings = judged(found_in_files(CHECKS["file-corrupt"]), setting("file-corrupt", severity))
    (finding,) = of(NOT_JUDGED, findings)
    assert "delta-norm" in finding.message
    assert "ZeroDivisionError: no weights, no norm" in finding.message
    assert bool(of("file-corrupt", findings)) == (severity is Severity.ERROR)


def test_running_out_of_memory_is_no_bug() -> None:
    assert "memory" in accident("x", MemoryError()).message
    assert "bug" not in accident("x", MemoryError()).hint


# --- what need not be known exactly ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((), MeasureOptions(estimates=True, estimated_ratio=250.0)),
        ((setting("rounding-loss", Severity.ERROR),), MeasureOptions(estimated_ratio=250.0)),
        ((setting("delta-norm", Severity.ERROR),), MeasureOptions(estimated_ratio=250.0)),
        ((setting("delta-norm", Severity.WARNING),), MeasureOptions(estimates=True, estimated_ratio=250.0)),
        (
            (CheckSetting(check="rounding-loss", severity=Severity.WARNING, limit=0.5, error_limit=0.9),),
            MeasureOptions(estimated_ratio=250.0),
        ),
        (
            (CheckSetting(check="delta-norm", severity=Severity.WARNING, limit=10.0, error_limit=40.0),),
            MeasureOptions(estimates=True, estimated_ratio=10.0),
        ),
        ((setting("headroom", Severity.ERROR),), MeasureOptions(estimates=True, estimated_ratio=250.0)),
    ],
)
def test_an_error_rests_on_a_measurement(settings: tuple[CheckSetting, ...], expected: MeasureOptions) -> None:
    assert measure_options(with_settings(spec(), *settings)) == expected
