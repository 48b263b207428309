"""A fleet on three bases, judged in every way: the same report except for times and marks."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING

import pytest

from merge_gate.report.formats.json_report import read
from tests.support.command import merge_gate, start, wait_until
from tests.support.small_fleet import BROKEN, VARIANTS, lay_fleet, same

if TYPE_CHECKING:
    from pathlib import Path

    from merge_gate.records.report import Report
    from tests.support.models import Shelf

ADAPTERS, SHARDS = 240, 4
RUN = ("run", "fleet.yml", "--device", "cpu", "--output")


def in_report(report: Path) -> int:
    """How many adapters a report has by now."""
    try:
        return len(json.loads(report.read_bytes())["adapters"])
    except (OSError, ValueError):
        return 0


@pytest.mark.nightly
def test_a_fleet_has_one_report_however_it_is_judged(shelf: Shelf, tmp_path: Path) -> None:
    """Cold, warm, in four shards, and again after a kill -9; tests/features/ray/test_ray.py has Ray.

    Of many adapters, no model is run. test_shards.py, test_cache.py, and test_ray.py do that with a small fleet.
    """
    path = lay_fleet(shelf, tmp_path, each=ADAPTERS // len(VARIANTS))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"forward": "off"}))

    def gated(*words: str) -> None:
        answer = merge_gate(*words, cwd=tmp_path)
        assert answer.code in {0, 1}, answer.said

    def report(directory: str) -> Report:
        return read((tmp_path / directory / "report.json").read_bytes(), directory)

    gated(*RUN, "cold", "--cache", "cache")
    gated(*RUN, "warm", "--cache", "cache")
    for number in range(1, SHARDS + 1):
        gated(*RUN, f"shards/{number}", "--shard", f"{number}/{SHARDS}")
    gated("report", "combine", "shards", "--output", "combined")
    process = start(*RUN, "killed", "--cache", "killed-cache", cwd=tmp_path)
    wait_until(lambda: in_report(tmp_path / "killed" / "report.json") >= ADAPTERS // 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert in_report(tmp_path / "killed" / "report.json") < ADAPTERS
    gated(*RUN, "killed", "--cache", "killed-cache")

    reports = {name: report(name) for name in ("cold", "warm", "combined", "killed")}
    assert [name for name, one in reports.items() if same(one) != same(reports["cold"])] == []
    whole = reports["cold"].adapters
    assert {one.name: one.cause for one in whole if one.cause} == BROKEN
    assert len({one.name for one in whole}) == ADAPTERS + 1, "and a combination of two"
    taken = {name: sum(one.cached for one in judged.adapters) for name, judged in reports.items()}
    assert taken["warm"] == len(whole) - 1, "all but the one that fails by its files"
    assert 0 < taken["killed"] < taken["warm"]
    assert taken["cold"] == taken["combined"] == 0
