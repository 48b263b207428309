"""When rounding-loss fires, and what it says: its messages are in rounding-loss.txt."""

from __future__ import annotations

import math

import pytest

from merge_gate.records.config import CheckSetting
from merge_gate.records.terms import Origin, Quantization, Severity
from tests.support.judging.cases import (
    LARGE,
    WEIGHT,
    Fire,
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


class TestRoundingLoss(EveryCheck):
    FIRES = (
        Fire(
            ("81.0%", "float16", "90.0%"),
            Origin.MERGE,
            evidence(merges=(lossy(0.81),)),
            places={"tensor": WEIGHT},
        ),
        Fire(
            ("(90.0%)",),
            Origin.MERGE,
            evidence(merges=(lossy(0.9), lossy(0.6), LARGE)),
        ),
    )
    SITUATIONS = (
        (
            "rounding, estimated, in two tensors of different size",
            (
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
                        merged(
                            tensor("all.weight"), module="all", delta_norm=0.5, lost_norm=0.0, unchanged_fraction=0.0
                        ),
                        merged(tensor("rest.weight"), module="rest", delta_norm=1.0, lost_norm=0.6),
                    )
                ),
                files(),
            ),
        ),
        (
            "rounding, of a weight that is quantized again",
            (
                evidence(base=base(quantization=Quantization.BNB_4BIT), merges=(lossy(0.6),)),
                files(),
            ),
        ),
        (
            "rounding, of most of them, quantized again",
            (
                evidence(
                    base=base(quantization=Quantization.BNB_8BIT),
                    merges=(lossy(0.9), lossy(0.9), lossy(0.0, delta_norm=100.0)),
                ),
                files(),
            ),
        ),
        (
            "rounding, without a count",
            (
                evidence(merges=(merged(base_norm=1.0, delta_norm=1.0, lost_norm=0.75),)),
                files(),
            ),
        ),
    )
    QUIET = (
        (evidence(merges=(lossy(0.5),)), files(), spec()),
        (evidence(merges=(lossy(0.9), lossy(0.1), LARGE, LARGE)), files(), spec()),
        (evidence(merges=(lossy(0.9), lossy(0.9), LARGE, LARGE)), files(), spec()),
        (evidence(merges=(merged(lost_norm=1.0, delta_norm=0.0),)), files(), spec()),
        (evidence(merges=(merged(lost_norm=math.inf, delta_norm=1.0),)), files(), spec()),
    )


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
