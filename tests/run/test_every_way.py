"""A fleet on three bases, judged in every way: the same report except for times and marks."""

import json
import signal
import subprocess
from pathlib import Path

import pytest

from merge_gate.records.report import Report
from tests.support.command import COMMAND, environment
from tests.support.fleet_commands import FIRST, kill_in_the_middle, stored, ways
from tests.support.small_fleet import BROKEN, VARIANTS, lay_fleet, same

ADAPTERS = 240


@pytest.mark.nightly
def test_a_fleet_has_one_report_however_it_is_judged(shelf, tmp_path: Path) -> None:
    """Cold, warm, in four shards, and again after a kill -9; tests/features/ray/test_ray.py has Ray.

    Of many adapters, no model is run. test_shards.py, test_cache.py, and test_ray.py do that with a small fleet.
    """
    path = lay_fleet(shelf, tmp_path, each=ADAPTERS // len(VARIANTS))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"forward": "off"}))
    reports: dict[str, Report] = {}
    for way in ways(with_ray=False):
        with (
            (tmp_path / "log").open("wb") as log,
            subprocess.Popen(
                [*COMMAND, *way.words],
                cwd=tmp_path,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            ) as process,
        ):
            if way.killed:
                judged = kill_in_the_middle(process, tmp_path / "killed" / "report.json", ADAPTERS // 3)
                assert ADAPTERS // 3 <= judged < ADAPTERS
        said = (tmp_path / "log").read_text(encoding="utf-8", errors="replace")[-4000:]
        assert process.returncode in ({-signal.SIGKILL} if way.killed else {0, 1}), f"{way.name}: {said}"
        if way.report is not None:
            reports[way.name] = stored(tmp_path / way.report)
            assert same(reports[way.name]) == same(reports[FIRST]), way.name
    whole = reports[FIRST]
    broken = {one.name: one.cause for one in whole.adapters if one.cause}
    assert broken == BROKEN
    assert len({one.name for one in whole.adapters}) == ADAPTERS + 1, "and a combination of two"
    taken = {name: sum(one.cached for one in report.adapters) for name, report in reports.items()}
    assert list(taken) == ["cold", "warm", "their combination", "run again"]
    files_alone = 1
    assert taken["warm"] == len(whole.adapters) - files_alone
    assert 0 < taken["run again"] < taken["warm"]
    assert taken["cold"] == taken["their combination"] == 0
