"""When delta-norm fires, and what it says: its messages are in delta-norm.txt."""

import dataclasses
import math

import pytest

from merge_gate.judging.checks.delta_norm import WIPED_SHARE
from merge_gate.records.config import CheckSetting
from merge_gate.records.measured import FileTensor, TensorMerge
from merge_gate.records.terms import Severity
from tests.support.judging.cases import (
    LORA_A,
    WEIGHT,
    Given,
    evidence,
    files,
    judge,
    merged,
    of,
    spec,
    tensor,
    with_settings,
)
from tests.support.judging.every_check import EveryCheck

ZERO = FileTensor(stats=tensor(LORA_A, minimum=0.0, maximum=0.0))


def small(share: float) -> TensorMerge:
    """A merged tensor whose norm is at most this share of the base's: 64 values."""
    most = 2.0 * share / math.sqrt(64)
    return merged(tensor(minimum=-most, maximum=most), base_norm=2.0, delta_norm=2.0)


def zeros(shape: tuple[int, ...] = (8, 8), name: str = WEIGHT) -> TensorMerge:
    return merged(tensor(name, shape=shape, minimum=0.0, maximum=0.0), base_norm=1.0, delta_norm=1.0)


class TestDeltaNorm(EveryCheck):
    FIRES = (
        Given(evidence(merges=(merged(base_norm=1.0, delta_norm=20.0),))),
        Given(evidence(merges=(zeros((64,)),))),
        Given(evidence(merges=(zeros((1, 64)),))),
        Given(evidence(file_tensors=(FileTensor(stats=tensor(LORA_A, minimum=0.0, maximum=0.0)),), merges=(merged(),))),
    )
    SITUATIONS = {
        "a matrix of zeros": Given(evidence(merges=(zeros(),))),
        "experts of zeros, and a bias": Given(evidence(merges=(zeros((2, 4, 8)), zeros((64,), "b.bias")))),
        "a matrix of almost zeros": Given(
            evidence(merges=(merged(tensor(minimum=-1e-8, maximum=1e-8), base_norm=1.0, delta_norm=1.0),))
        ),
        "two large deltas, the larger one estimated": Given(
            evidence(
                merges=(
                    merged(base_norm=1.0, delta_norm=20.0),
                    merged(tensor("b.weight"), module="b", base_norm=2.0, delta_norm=88.0, estimated=True),
                    merged(tensor("c.weight"), module="c", base_norm=2.0, delta_norm=float("inf")),
                    merged(tensor("d.weight"), module="d", base_norm=2.0, delta_norm=20.0),
                )
            )
        ),
        "a delta that is too large for a typical weight": Given(
            evidence(merges=(merged(tensor(shape=(8, 8), numel=64), base_norm=0.0, delta_norm=6e6),), typical_rms=0.5)
        ),
        "two large deltas of one size": Given(
            evidence(
                merges=(
                    merged(base_norm=1.0, delta_norm=20.0),
                    merged(tensor("b.weight"), module="b", base_norm=2.0, delta_norm=40.0),
                )
            )
        ),
    }
    QUIET = (
        Given(evidence(merges=(merged(base_norm=1.0, delta_norm=10.0),))),
        Given(evidence(merges=(merged(base_norm=0.0, delta_norm=10.0),))),
        Given(evidence(merges=(small(1.01 * WIPED_SHARE),))),
        Given(evidence(file_tensors=(ZERO,), merges=(merged(changed=False),))),
    )


def test_a_weight_left_with_less_than_rounding_is_wiped_out() -> None:
    (finding,) = judge(spec(), files(), evidence(merges=(small(WIPED_SHARE),)))
    assert (finding.check, finding.tensor, finding.severity) == ("delta-norm", WEIGHT, Severity.ERROR)


@pytest.mark.parametrize(("share", "severity"), [(WIPED_SHARE, Severity.WARNING), (WIPED_SHARE / 64, Severity.ERROR)])
def test_an_error_rests_on_no_estimate(share: float, severity: Severity) -> None:
    merge = dataclasses.replace(small(share), estimated=True)
    (finding,) = judge(spec(), files(), evidence(merges=(merge,)))
    assert finding.severity is severity


@pytest.mark.parametrize(
    ("setting", "severity"),
    [
        (CheckSetting(check="delta-norm", severity=Severity.WARNING, wiped=Severity.WARNING), Severity.WARNING),
        (CheckSetting(check="delta-norm", severity=Severity.WARNING, limit=1e9), Severity.ERROR),
        (CheckSetting(check="delta-norm", severity=Severity.ERROR), Severity.ERROR),
        (CheckSetting(check="delta-norm", severity=Severity.OFF), None),
    ],
)
def test_zeros_can_be_allowed(setting: CheckSetting, severity: Severity | None) -> None:
    found = of("delta-norm", judge(with_settings(spec(), setting), files(), evidence(merges=(zeros(),))))
    assert [finding.severity for finding in found] == ([severity] if severity else [])


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
def test_a_delta_above_the_error_limit_fails(settings, ratio, shape, severity) -> None:
    merge = merged(dataclasses.replace(tensor(), shape=shape), base_norm=1.0, delta_norm=ratio)
    found = of("delta-norm", judge(with_settings(spec(), *settings), files(), evidence(merges=(merge,))))
    assert [finding.severity for finding in found] == ([severity] if severity else [])
    # A program sees the limit that the message names.
    assert [("error-limit" in finding.message) for finding in found] == [
        "error_limit" in dict(finding.measured) for finding in found
    ]


def test_a_bias_above_the_limit_does_not_fail_a_matrix_below_it() -> None:
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
def test_a_delta_is_compared_with_the_models_typical_weight_too(weight, typical, delta, severity, ratio) -> None:
    """All are RMS; the matrix has 64 values, so that its norms are 8 times as large."""
    shape = dataclasses.replace(tensor(), shape=(8, 8), numel=64)
    merge = merged(shape, base_norm=8 * weight, delta_norm=8 * delta)
    found = of("delta-norm", judge(spec(), files(), evidence(merges=(merge,), typical_rms=typical)))
    assert [finding.severity for finding in found] == ([severity] if severity else [])
    assert [dict(finding.measured)["ratio"] for finding in found] == ([pytest.approx(ratio)] if ratio else [])


def test_the_matrix_that_fails_is_named_and_no_smaller_weight() -> None:
    shape = dataclasses.replace(tensor(), shape=(8, 8), numel=64)
    tiny = merged(shape, base_norm=1e-9, delta_norm=1.0)
    exploded = merged(dataclasses.replace(shape, name="b.weight"), base_norm=1.0, delta_norm=1e6)
    (finding,) = of("delta-norm", judge(spec(), files(), evidence(merges=(tiny, exploded), typical_rms=1 / 8)))
    assert (finding.severity, finding.tensor) == (Severity.ERROR, "b.weight")
