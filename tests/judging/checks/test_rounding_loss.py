"""When rounding-loss fires, and what it says: its messages are in rounding-loss.txt."""

import math

import pytest

from merge_gate.judging.all_checks import measure_options
from merge_gate.records.config import CheckSetting
from merge_gate.records.measured import NORM_LIMIT, Evidence, Forward, TensorMerge
from merge_gate.records.terms import Quantization, Severity
from tests.support.faults import Case, shrink
from tests.support.judging.cases import (
    LARGE,
    Given,
    base,
    evidence,
    files,
    judge,
    lossy,
    merged,
    of,
    spec,
    tensor,
    with_settings,
)
from tests.support.judging.every_check import EveryCheck


def run(change: float, *merges: TensorMerge, choices: int = 0, typical: float | None = None) -> Evidence:
    """An adapter whose effect was measured. Rounding loses 98 % of its norm by default."""
    forward = Forward(ran=True, effect=0.02, rounding_change=change, choices_changed=choices, typical_effect=typical)
    return evidence(merges=merges or (lossy(0.98),), forward=forward)


class TestRoundingLoss(EveryCheck):
    FIRES = (
        Given(run(0.62)),
        Given(evidence(merges=(lossy(0.81),))),
        Given(evidence(merges=(lossy(0.9), lossy(0.6), LARGE))),
    )
    SITUATIONS = {
        "most of the effect changes": Given(run(0.85)),
        "the effect seems to change, and is small on these inputs": Given(run(1.61, typical=0.061)),
        "the effect of experts changes": Given(run(0.5, lossy(0.7, estimated=True), LARGE, choices=3)),
        "rounding, estimated, in two tensors of different size": Given(
            evidence(
                merges=(
                    lossy(0.8, estimated=True),
                    merged(
                        tensor("model.norm.weight", numel=192, dtype="bfloat16"),
                        module="model.norm",
                        base_norm=5.0,
                        delta_norm=2.0,
                        lost_norm=1.8,
                        unchanged_fraction=0.5,
                    ),
                    merged(tensor("all.weight"), module="all", delta_norm=0.5, lost_norm=0.0, unchanged_fraction=0.0),
                    merged(tensor("rest.weight"), module="rest", delta_norm=1.0, lost_norm=0.6),
                )
            )
        ),
        "rounding, of a weight that is quantized again": Given(
            evidence(base=base(quantization=Quantization.BNB_4BIT), merges=(lossy(0.6),))
        ),
        "rounding, of most of them, quantized again": Given(
            evidence(
                base=base(quantization=Quantization.BNB_8BIT),
                merges=(lossy(0.9), lossy(0.9), lossy(0.0, delta_norm=100.0)),
            )
        ),
        "rounding, without a count": Given(evidence(merges=(merged(base_norm=1.0, delta_norm=1.0, lost_norm=0.75),))),
    }
    FAULTS = (
        Case(
            "rounded-away",
            break_=shrink("lora_B", 1e-4),
            dtype="bfloat16",
            cause="rounding-loss",
            origin="merge",
            tensor="q_proj.weight",
        ),
    )
    QUIET = (
        Given(run(0.4)),
        Given(run(0.08)),
        Given(evidence(merges=(lossy(0.5),))),
        Given(evidence(merges=(lossy(0.9), lossy(0.1), LARGE, LARGE))),
        Given(evidence(merges=(lossy(0.9), lossy(0.9), LARGE, LARGE))),
        Given(evidence(merges=(merged(lost_norm=1.0, delta_norm=0.0),))),
        Given(evidence(merges=(merged(lost_norm=math.inf, delta_norm=1.0),))),
    )


def configured(limit: float | None, error_limit: float | None = None) -> CheckSetting:
    return CheckSetting(check="rounding-loss", severity=Severity.WARNING, limit=limit, error_limit=error_limit)


@pytest.mark.parametrize(
    ("limit", "error_limit", "change", "severity"),
    [
        (0.4, None, 0.8, Severity.WARNING),
        (0.4, None, 0.81, Severity.ERROR),
        (0.4, 0.9, 0.85, Severity.WARNING),
        (0.4, 0.6, 0.65, Severity.ERROR),
        (0.9, None, 0.85, None),  # a limit above the default error-limit means what it says
        (0.9, None, 0.95, Severity.WARNING),
    ],
)
def test_the_effect_decides_if_it_was_measured(limit, error_limit, change, severity) -> None:
    findings = judge(with_settings(spec(), configured(limit, error_limit)), files(), run(change))
    found = of("rounding-loss", findings)
    assert [finding.severity for finding in found] == ([] if severity is None else [severity])
    assert ["error_limit" in dict(finding.measured) for finding in found] == [severity is Severity.ERROR] * len(found)
    assert all(dict(finding.measured)["rounding_change"] == change for finding in found)


@pytest.mark.parametrize(("limit", "fires_above"), [(0.4, 0.5), (0.2, 0.2), (0.9, 0.9)])
def test_the_norm_alone_only_warns(limit: float, fires_above: float) -> None:
    chosen = with_settings(spec(), configured(limit, 0.95))
    assert measure_options(chosen).norm_limit == fires_above  # above it, the engine measures the effect
    for lost, severities in ((fires_above, []), (0.99, [Severity.WARNING])):
        found = of("rounding-loss", judge(chosen, files(), evidence(merges=(lossy(lost),))))
        assert [finding.severity for finding in found] == severities


@pytest.mark.parametrize(
    ("typical", "severity"), [(None, Severity.ERROR), (0.059, Severity.ERROR), (0.061, Severity.WARNING)]
)
def test_an_effect_that_is_small_on_these_inputs_only_warns(typical: float | None, severity: Severity) -> None:
    (found,) = of("rounding-loss", judge(spec(), files(), run(1.61, typical=typical)))
    assert found.severity is severity
    assert ("rounding_change" in dict(found.measured)) is (severity is Severity.ERROR)


def test_the_effect_is_only_measured_if_the_check_can_use_it() -> None:
    off = CheckSetting(check="rounding-loss", severity=Severity.OFF, limit=0.4)
    assert measure_options(with_settings(spec(), off)).norm_limit == math.inf
    assert measure_options(spec()).norm_limit == NORM_LIMIT
