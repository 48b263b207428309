"""The estimates of `--plan` against the runs that their unit costs come from (benchmarks/README.md)."""

from __future__ import annotations

import pytest

from merge_gate.records.files import AdapterConfig
from merge_gate.records.terms import Quantization
from merge_gate.run import estimate
from merge_gate.run.estimate import BaseWork, coarse, cost_of_merge, estimate_s

SMALL, SEVEN, EIGHT = 2_200_000_000, 13_500_000_000, 16_100_000_000


@pytest.mark.parametrize(
    ("work", "measured_s"),
    [
        (BaseWork(size_bytes=SMALL, merges=1), 4.2),
        (BaseWork(size_bytes=SMALL, merges=8), 11.1),
        (BaseWork(size_bytes=SEVEN, in_passes=True, merges=4), 41.4),
        (BaseWork(size_bytes=EIGHT, in_passes=True, from_network=True, merges=1), 92.2),
        (BaseWork(size_bytes=EIGHT, in_passes=True, from_network=True, merges=8), 94.7),
        (BaseWork(size_bytes=SMALL, merges=2 * 3.1), 12.5),
        (BaseWork(size_bytes=SMALL, merges=8 * 3.1), 24.3),
    ],
)
def test_an_estimate_is_within_a_factor_of_two(
    work: BaseWork, measured_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "usable_cores", lambda: 2)
    seconds = estimate_s([work], adapter_bytes=0, download_bytes=0, published_bytes=0)
    assert measured_s / 2 < seconds < measured_s * 2


def test_downloads_and_published_models_take_time() -> None:
    def seconds(**sizes: int) -> float:
        return estimate_s([], **({"adapter_bytes": 0, "download_bytes": 0, "published_bytes": 0} | sizes))

    idle = seconds()
    assert seconds(download_bytes=EIGHT) == pytest.approx(idle + 80.5)
    assert seconds(published_bytes=SMALL) == pytest.approx(idle + 9.9)
    assert seconds(adapter_bytes=SMALL) > idle


def test_other_methods_and_quantized_bases_cost_more() -> None:
    lora, dora = AdapterConfig(peft_type="LORA"), AdapterConfig(peft_type="LORA", use_dora=True)
    plain, packed = Quantization.NONE, Quantization.BNB_4BIT
    costs = [cost_of_merge(config, kind) for config, kind in ((lora, plain), (dora, plain), (lora, packed))]
    assert costs == sorted(costs)
    assert costs[0] == 1
    assert cost_of_merge(AdapterConfig(peft_type="BOFT"), plain) > costs[-1]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.2, 1), (3.4, 3), (42.0, 40), (95.0, 90), (700.0, 720), (1e5, 100800)]
)
def test_an_estimate_has_few_digits(seconds: float, shown: float) -> None:
    assert coarse(seconds) == shown
