"""Verdicts that are kept, by the real command: cold, warm, changed, and after kill -9: one report except for marks."""

import contextlib
import html
import json
import os
import shutil
from pathlib import Path

import pytest

from merge_gate.config.load_config import load_config
from merge_gate.features.cache import remembered
from merge_gate.records.options import RunOptions
from merge_gate.records.report import AdapterReport, Report
from merge_gate.records.terms import Result, Verdict
from merge_gate.report.formats.json_report import read, render
from merge_gate.report.stored.report_files import FORMATS
from merge_gate.run.flow import run_gate
from merge_gate.run.view import View
from tests.support.command import PATIENCE_S, merge_gate, start
from tests.support.faults import poison
from tests.support.fleet_commands import kill_in_the_middle, stored
from tests.support.small_fleet import BROKEN, same

FILES_ALONE = {"float16-base-0"}
"""Judged by their files alone, which is done in every run."""
SECRET = "a secret of the tests, long enough"


@pytest.fixture
def copy(fleet: Path, tmp_path: Path) -> Path:
    """The fleet for a test that changes something; files keep their times, and have other inodes."""
    shutil.copytree(fleet, tmp_path / "copy")
    return tmp_path / "copy"


def cached(report: Report) -> set[str]:
    return {one.name for one in report.adapters if one.cached}


def judged(report: Report) -> set[str]:
    return {one.name for one in report.adapters if not one.cached} - FILES_ALONE


def everyone(report: Report) -> set[str]:
    return {one.name for one in report.adapters} - FILES_ALONE


def run(place: Path, *only: str, view: View | None = None, fresh: bool = False, output: str | None = None) -> Report:
    """A run in this process."""
    options = RunOptions(only=only, output=output, features={"cache": str(place / "cache"), "refresh": fresh})
    with contextlib.chdir(place):
        report = run_gate(load_config("fleet.yml"), options, view=view)
    return read(render(report).encode(), "report.json")  # which rounds figures


@pytest.fixture
def no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that starts a worker, and so imports torch, fails."""
    monkeypatch.setattr("merge_gate.worker.supervisor.WorkerProcess", lambda **_: pytest.fail("a worker was started"))


def test_a_warm_run_is_the_cold_one_but_for_marks(fleet: Path) -> None:
    cold = stored(fleet / "cold")
    answer = merge_gate("run", "fleet.yml", "--cache", "cache", "--output", "warm", cwd=fleet)
    assert answer.code == 1, answer.said
    warm = stored(fleet / "warm")
    assert same(warm) == same(cold)
    assert cached(warm) == everyone(warm)
    assert not cached(cold)
    assert {one.name: one.cause for one in warm.adapters if one.cause} == BROKEN
    for before, after in zip(cold.adapters, warm.adapters, strict=True):
        assert (after.judged and after.judged.key) == (before.judged and before.judged.key)
        assert after.seconds == 0.0
    marked = [one.judged for one in warm.adapters if one.cached]
    for name in FORMATS:
        text = html.unescape((fleet / "warm" / name).read_text(encoding="utf-8"))
        assert "cached" in text, name
        assert all(one is not None and one.at in text for one in marked), name
    assert f"{len(marked)} of {len(warm.adapters)} verdicts" in answer.out
    assert all(one is not None and f"judged {one.at} at {one.place}" in answer.err for one in marked)


@pytest.mark.usefixtures("no_worker")
def test_where_all_is_known_no_worker_is_started(fleet: Path) -> None:
    report = run(fleet)
    assert same(report) == same(stored(fleet / "cold"))
    assert cached(report) == everyone(report)


@pytest.mark.usefixtures("no_worker")
def test_names_lines_and_time_limits_may_change(copy: Path) -> None:
    config = json.loads((copy / "fleet.yml").read_text())
    config["limits"] = {"seconds": 1000}
    config["adapters"] = [one for one in config["adapters"][::-1] if "combine" not in one]
    for one in config["adapters"]:
        one["name"] = f"renamed-{one['path'].rpartition('/')[2]}"
    (copy / "fleet.yml").write_text(json.dumps(config))
    report = run(copy)
    assert len(cached(report)) == len(config["adapters"]) - len(FILES_ALONE)
    assert all(one.name.startswith("renamed-") for one in report.adapters)
    assert report.adapters[0].line == 1


@pytest.fixture(scope="module")
def changed(fleet: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report, list[str]]:
    """A copy of the fleet in which much has changed, its report, and the formats that named `plain-2` before a merge.

    Changed are an adapter's bytes, another's settings, a byte of a base's weights without a new time, and another base
    by a file next to its weights.
    """
    copy = tmp_path_factory.mktemp("changed") / "copy"
    shutil.copytree(fleet, copy)
    poison("lora_A", where="first")(copy / "adapters" / "plain-0")
    config = json.loads((copy / "fleet.yml").read_text())
    for one in config["adapters"]:
        if one.get("path") == "./adapters/rslora-1":
            one["checks"] = {"headroom": {"limit": 0.4}}
    (copy / "fleet.yml").write_text(json.dumps(config))
    (copy / "bert-classifier" / "modeling_extra.py").write_text("# nobody asked for it\n")
    weights = copy / "llama-float16" / "model.safetensors"
    before = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    named: list[str] = []

    class Waiting(View):
        def base_loading(self, *_: object) -> None:
            named.extend(name for name in FORMATS if "plain-2" in (copy / "out" / name).read_text(encoding="utf-8"))

    report = run(copy, view=Waiting(), output="out")
    return copy, report, named


@pytest.mark.slow
def test_what_changed_is_judged_and_nothing_else(changed: tuple[Path, Report, list[str]]) -> None:
    copy, report, _ = changed
    on_changed_bases = {one for one in everyone(report) if one.startswith(("classifier", "float16-base"))}
    assert len(on_changed_bases) == 5
    assert judged(report) == {"plain-0", "rslora-1", "blend", *on_changed_bases}
    again = run(copy)
    assert cached(again) == everyone(again)
    assert same(again) == same(report)


def test_cached_verdicts_are_in_every_format_before_any_merge(changed: tuple[Path, Report, list[str]]) -> None:
    """A run that is killed then leaves it, and its last report takes less time."""
    _, _, named = changed
    assert named[: len(FORMATS)] == list(FORMATS)


@pytest.mark.usefixtures("no_worker")
def test_an_accepted_failure_is_accepted_from_the_cache_too(copy: Path) -> None:
    """The baseline is of today: neither kept nor part of the key."""
    answer = merge_gate("report", "baseline", "cold/report.json", cwd=copy)
    assert answer.code == 0, answer.said
    text = answer.out.replace('reason: ""', "reason: known").replace('owner: ""', "owner: team-a")
    (copy / "known.yml").write_text(text)
    config = json.loads((copy / "fleet.yml").read_text())
    (copy / "fleet.yml").write_text(json.dumps(config | {"baseline": "known.yml"}))
    report = run(copy)
    assert report.result is Result.PASS
    assert {
        one.name: one.accepted is not None for one in report.adapters if one.verdict is Verdict.FAILED
    } == dict.fromkeys(BROKEN, True)
    assert cached(report) == everyone(report)


def test_torch_is_asked_once_for_the_device_if_there_is_a_card(
    copy: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """A worker without a job says what it would merge on; the cache knows it until the machine starts anew."""
    monkeypatch.setattr(remembered, "has_card", lambda: True)
    first = run(copy, "plain-0")
    assert cached(first) == {"plain-0"}
    assert first.environment.device == "cpu"
    assert len(list((copy / "cache" / "devices").iterdir())) == 1
    request.getfixturevalue("no_worker")
    assert same(run(copy, "plain-0")) == same(first)


# --- attacked ------------------------------------------------------------------------------------------------------


def forge(cache: Path, name: str, verdict: str) -> None:
    """Say of one adapter what was not so, with a seal that anybody can make."""
    from merge_gate.features.cache.store import Seal  # noqa: PLC0415
    from merge_gate.run.verdict_key import canonical  # noqa: PLC0415

    for path in (cache / "verdicts").iterdir():
        document = json.loads(path.read_bytes().partition(b"\n")[2])
        if document["adapter"]["cause"] == name:
            document["adapter"] |= {"verdict": verdict, "cause": None, "findings": []}
            body = canonical(document)
            path.write_bytes(Seal().of("verdicts", path.name, body).encode() + b"\n" + body)


@pytest.mark.slow
@pytest.mark.attempt("C01", "a forged verdict in the cache", "a miss with a secret, believed without, as documented")
def test_a_forged_verdict_is_believed_only_without_a_secret(copy: Path) -> None:
    """The first half is what docs/guides/fleets.md warns of: it must be said as long as it is so."""
    forge(copy / "cache", "adapter-nonfinite", "passed")
    words = ("run", "fleet.yml", "--only", "plain-1", "--cache", "cache")
    assert merge_gate(*words, cwd=copy).code == 0
    answer = merge_gate(*words, cwd=copy, MERGE_GATE_CACHE_KEY=SECRET)
    assert answer.code == 1, answer.said
    assert "adapter-nonfinite" in answer.out
    again = merge_gate(*words, cwd=copy, MERGE_GATE_CACHE_KEY=SECRET)
    assert again.code == 1
    assert cached(stored(copy / "merge-gate-report")) == {"plain-1"}
    assert SECRET not in "".join(path.read_text("latin-1") for path in (copy / "cache").rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.attempt("C02", "entries of the cache exchanged with others", "a miss")
def test_every_entry_exchanged_with_another_is_a_miss(copy: Path) -> None:
    files = sorted((copy / "cache" / "verdicts").iterdir())
    bodies = [path.read_bytes() for path in files]
    for path, body in zip(files, bodies[1:] + bodies[:1], strict=True):
        path.write_bytes(body)
    report = run(copy)
    assert not cached(report)
    assert same(report) == same(stored(copy / "cold"))


class Meddler(View):
    """Touches a file as soon as so many adapters are settled."""

    def __init__(self, path: Path, count: int) -> None:
        self.path, self.count = path, count

    def adapter_done(self, adapter: AdapterReport) -> None:
        del adapter
        self.count -= 1
        if self.count == 0:
            os.utime(self.path)


@pytest.mark.usefixtures("no_worker")
def test_a_base_that_changes_in_a_warm_run_has_no_verdict(copy: Path) -> None:
    count = len(stored(copy / "cold").adapters)
    report = run(copy, view=Meddler(copy / "llama" / "model.safetensors", count))
    on_it = [one for one in report.adapters if one.name.startswith(("plain", "rslora", "blend"))]
    assert {one.verdict for one in on_it} == {Verdict.ERROR}
    assert "changed" in on_it[0].findings[0].message
    assert {one.verdict for one in report.adapters if one.name.startswith("classifier")} == {Verdict.PASSED}


def test_a_cache_that_is_a_file_is_a_usage_error(fleet: Path) -> None:
    answer = merge_gate("run", "fleet.yml", "--cache", "fleet.yml", "--output", "none", cwd=fleet)
    assert answer.code == 2
    assert "fleet.yml" in answer.err
    answer = merge_gate("run", "fleet.yml", "--cache", "c", "--output", "none", cwd=fleet, MERGE_GATE_CACHE_KEY="short")
    assert answer.code == 2
    assert "MERGE_GATE_CACHE_KEY has 5 bytes" in answer.err


@pytest.mark.slow
def test_two_runs_with_refresh_share_a_directory(copy: Path) -> None:
    """Two of the verdicts are there already, and `--refresh` judges them again; the third one is gone."""
    names = ("plain-0", "plain-1", "rslora-0")
    only = [word for name in names for word in ("--only", name)]
    before = {one.name: one.judged for one in stored(copy / "cold").adapters}
    for path in (copy / "cache" / "verdicts").iterdir():
        if path.name == before["rslora-0"].key:
            path.unlink()
    shutil.rmtree(copy / "cache" / "bases")  # both make it again
    first = start("run", "fleet.yml", *only, "--cache", "cache", "--refresh", "--output", "a", cwd=copy)
    answer = merge_gate("run", "fleet.yml", *only, "--cache", "cache", "--refresh", "--output", "b", cwd=copy)
    assert first.wait(PATIENCE_S) == answer.code == 1
    reports = [stored(copy / directory) for directory in ("a", "b")]
    assert same(reports[0]) == same(reports[1])
    assert [judged(report) for report in reports] == [set(names)] * 2
    kept = run(copy, *names)
    assert cached(kept) == set(names)
    for one in kept.adapters:
        assert one.judged in [other.judged for report in reports for other in report.adapters if other.name == one.name]
        assert one.judged != before[one.name]


# --- killed --------------------------------------------------------------------------------------------------------


KILLED = ("fleet.yml", "--output", "killed", "--cache", "killed-cache")


@pytest.mark.slow
def test_killed_twice_with_a_cache_is_the_whole_run(fleet: Path) -> None:
    for count in (4, 7):
        kill_in_the_middle(start("run", *KILLED, cwd=fleet), fleet / "killed" / "report.json", count)
        assert not stored(fleet / "killed").complete
    answer = merge_gate("run", *KILLED, cwd=fleet)
    assert answer.code == 1, answer.said
    report = stored(fleet / "killed")
    assert same(report) == same(stored(fleet / "cold"))
    assert len([one for one in report.adapters if one.cached]) >= 6
