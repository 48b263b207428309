"""Bases on a network mount: a FUSE mount whose server works, dies, or answers EIO in the middle of a base."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import merge_gate, start, strict_json, wait_until
from tests.support.e2e.fuse_mount import mounted

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="no /dev/fuse here, so nothing can be mounted"),
]

ENDS_WITHIN_S = 90.0
HANG_ENDS_WITHIN_S = 180.0
"""Two time limits of 8 s, and half a minute for the comparison of the files; an unbounded wait takes ten minutes."""

SETTINGS = """\
version: 1
base: {{model: {base}, dtype: float16}}
adapters:
  - {{path: {adapters}/good, limits: {{seconds: 20}}}}
  - {{path: {adapters}/nan, limits: {{seconds: 20}}}}
"""


@pytest.fixture
def gate(demo: Path, tmp_path: Path) -> Iterator[Any]:
    def run(base: Path) -> tuple[int, dict[str, Any], str]:
        config = tmp_path / "merge-gate.yml"
        config.write_text(SETTINGS.format(base=base, adapters=demo / "adapters"), encoding="utf-8")
        done = merge_gate("run", config.name, cwd=tmp_path)
        report = json.loads((tmp_path / "merge-gate-report" / "report.json").read_text(encoding="utf-8"))
        return done.code, report, done.said

    return run


def test_a_base_on_a_mount_is_judged_as_on_disk(gate: Any, demo: Path, tmp_path: Path) -> None:
    on_disk = gate(demo / "base")
    with mounted(demo / "base", tmp_path / "mount"):
        on_mount = gate(tmp_path / "mount")
    assert on_mount[0] == on_disk[0] == 1, on_mount[2]
    for key in ("verdict", "cause", "coverage"):
        assert [one[key] for one in on_mount[1]["adapters"]] == [one[key] for one in on_disk[1]["adapters"]]
    assert on_mount[1]["bases"][0]["sha256"] == on_disk[1]["bases"][0]["sha256"]


@pytest.mark.parametrize("after_bytes", [0, 60_000, 200_000])
@pytest.mark.parametrize("fails", ["dies", "eio"])
def test_a_mount_that_fails_is_an_error_and_no_hang(
    gate: Any, demo: Path, tmp_path: Path, fails: str, after_bytes: int
) -> None:
    started = time.monotonic()
    with mounted(demo / "base", tmp_path / "mount", fails=fails, after_bytes=after_bytes):
        code, report, said = gate(tmp_path / "mount")
    assert time.monotonic() - started < ENDS_WITHIN_S
    assert code == 3, said
    assert {one["verdict"] for one in report["adapters"]} == {"error"}
    assert "SIGBUS" not in said
    assert "Traceback" not in said


def test_a_mount_that_hangs_costs_each_adapter_its_time_limit(demo: Path, tmp_path: Path) -> None:
    """The reason of an error stays in the report, though the files cannot be compared at the end.

    The process ends when the server of the mount does: until then, the kernel keeps the threads that read.
    """
    config, report = tmp_path / "merge-gate.yml", tmp_path / "merge-gate-report" / "report.json"
    settings = SETTINGS.format(base=tmp_path / "mount", adapters=demo / "adapters").replace("seconds: 20", "seconds: 8")
    config.write_text(settings, encoding="utf-8")
    started = time.monotonic()
    with mounted(demo / "base", tmp_path / "mount", fails="hangs", after_bytes=60_000):
        process = start("run", config.name, cwd=tmp_path)
        wait_until(lambda: report.exists() and strict_json(report)["complete"], process)
        assert time.monotonic() - started < HANG_ENDS_WITHIN_S
    assert process.wait(ENDS_WITHIN_S) == 3
    found = strict_json(report)["adapters"]
    assert {one["verdict"] for one in found} == {"error"}
    for one in found:
        assert any("time limit of 8 s" in finding["message"] for finding in one["findings"]), one
