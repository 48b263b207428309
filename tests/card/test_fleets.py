"""A CPU and a simulated card judge the same fleets: the reports and the published bits are equal.

`make card` takes a fifth of the cases of each kind, `make card CARD=all` takes all of them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.card import build
from tests.support.card.fleets import FLEETS, SAMPLES
from tests.support.card.runs import Device, run_fleet
from tests.support.gating import one_thread


@pytest.mark.parametrize("name", FLEETS)
@pytest.mark.filterwarnings("ignore")  # of what PEFT and transformers write: the CPU's tests of the fleet watch those
def test_a_card_judges_as_a_cpu(name: str, card: Path, tmp_path: Path) -> None:
    device = Device(name="cuda", environment=build.environment(card))
    with one_thread():
        outcome = run_fleet(FLEETS[name], tmp_path, SAMPLES[os.environ.get("CARD", "fifth")], device)
    assert outcome.adapters > 0
    assert not outcome.differences, "\n".join(map(str, outcome.differences))
