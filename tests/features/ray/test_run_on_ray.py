"""A run on a cluster, with a stand-in for Ray that runs each shard in this process: the report of one machine.

tests/features/ray/test_ray.py has real clusters.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from merge_gate._internal.errors import GateError, UsageError
from merge_gate.config.load_config import load_config
from merge_gate.features.ray import feature as module
from merge_gate.features.ray.feature import MAX_LOSSES, run_shard
from merge_gate.records.config import Config, PublishSpec
from merge_gate.records.options import RunOptions
from merge_gate.records.refusals import NotJudged
from merge_gate.records.report import AdapterReport, Report
from merge_gate.records.terms import Access, Result, Verdict
from merge_gate.report.stored.report_files import read_report
from merge_gate.run import flow
from merge_gate.run.flow import run_gate
from merge_gate.run.view import View
from merge_gate.worker.protocol import Event, Job, MergeStarted, Unjudged
from merge_gate.worker.supervisor import WorkerSlot
from tests.support.fake_ray import Ray
from tests.support.faults import poison
from tests.support.models import Shelf
from tests.support.small_fleet import same
from tests.support.wording import Wording

NAMES = ("one", "two", "three")


class Shown(View):
    """Keeps what it shows."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.done: list[AdapterReport] = []
        self.started: list[tuple[int, int]] = []
        self.finished: list[str] = []

    def adapter_started(self, name: str, index: int, total: int, dtype: str) -> None:
        self.started.append((index, total))

    def adapter_done(self, adapter: AdapterReport) -> None:
        self.done.append(adapter)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def finish(self, report: Report, output_dir: str) -> None:
        self.finished.append(output_dir)


@pytest.fixture
def place(shelf: Shelf, tmp_path: Path, cwd) -> Path:
    """Three adapters on one base, one of them broken."""
    shutil.copytree(shelf.base("llama"), tmp_path / "base")
    for name in NAMES:
        shutil.copytree(shelf.adapter("plain"), tmp_path / name)
    poison("lora_B", where="last")(tmp_path / "three")
    adapters = [{"path": f"./{name}", "base": {"model": "./base"}} for name in NAMES]
    (tmp_path / "gate.yml").write_text(json.dumps({"version": 1, "adapters": adapters}))
    return tmp_path


@pytest.fixture
def quick(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No worker merges anything, so nothing is judged."""

    def supervise(job: Job, listen: Callable[[Event], None], *_: object) -> None:
        for task in (task for group in job.groups for task in group.tasks):
            listen(MergeStarted(task=task.index))
            listen(Unjudged(task=task.index, refusal=NotJudged(message="merged")))

    monkeypatch.setattr(WorkerSlot, "start", lambda *_, **__: None)
    monkeypatch.setattr(flow, "supervise", supervise)
    return place


def judged(ray: Ray, view: View | None = None, *, address: str = "head:6379", **options: Any) -> Report:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "cluster", lambda _: contextlib.nullcontext(ray))
        patched.setattr(module, "PATIENCE_S", 0.01)
        own = {name: options.pop(name) for name in ("device", "output", "only") if name in options}
        config = published(options.pop("publish", None))
        asked = RunOptions(**{"device": "cpu"} | own, features={**options, "ray": address})
        return run_gate(config, asked, view=view or View())


def published(directory: str | None) -> Config:
    """The configuration, with a directory for the models."""
    spec = PublishSpec(directory=directory, label=directory) if directory is not None else None
    return replace(load_config("gate.yml"), publish=spec)


def stored() -> Report:
    with Path("report/report.json").open("rb") as file:
        return read_report(file, "report")


def messages(report: Report) -> dict[str, str]:
    """What each adapter that was not judged has for a reason."""
    errors = [one for one in report.adapters if one.verdict is Verdict.ERROR]
    return {one.name: one.findings[one.decided_by].message for one in errors if one.decided_by is not None}


def started(name: str) -> Callable[[tuple[int, int], Any], bool]:
    """A task is lost as soon as it merges this adapter."""
    return lambda _, item: isinstance(item, tuple) and item[0] == "adapter_started" and item[1][0] == name


# --- a sound cluster -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_report_models_and_verdicts_are_those_of_one_machine(place: Path) -> None:
    """Relative names are those of the machine of the run, wherever a task starts."""
    whole = run_gate(published("here"), RunOptions(device="cpu"))
    ray, view, works = Ray({"CPU": 1.0}), Shown(), []
    ray.changes = lambda work: works.append(work) or work
    report = judged(ray, view, publish="there", output="report", cache="cache")
    assert works[0].config.publish.directory == str(place / "there")
    assert works[0].options.features["cache"] == str(place / "cache")
    expected = {one.name: one.published for one in whole.adapters}
    for one in report.adapters:
        wanted = expected[one.name]
        assert (one.published is None) == (wanted is None) == (one.name == "three")
        if one.published is not None and wanted is not None:
            assert one.published.directory == f"there/{one.name}"
            assert {file.path: file.sha256 for file in one.published.files if "merge-gate" not in file.path} == {
                file.path: file.sha256 for file in wanted.files if "merge-gate" not in file.path
            }
    unpublished = [
        replace(one, adapters=tuple(replace(each, published=None) for each in same(one).adapters), shard=None)
        for one in (report, whole)
    ]
    assert same(unpublished[0]) == same(unpublished[1])
    assert {entry.name for entry in Path("there").iterdir()} == {"one", "two"}, "no mark is left"
    assert (len(view.done), view.finished) == (3, ["report"])
    assert view.started[-1][1] == 3
    assert (stored().complete, stored().counts, stored().problems) == (True, report.counts, ())
    again = judged(Ray({"CPU": 1.0}), cache="cache")
    assert [one.cached for one in again.adapters] == [True, True, True]


@pytest.mark.nightly
def test_an_interrupted_run_has_a_true_report_and_cache(place: Path) -> None:
    class Interrupts(Shown):
        def adapter_done(self, adapter: AdapterReport) -> None:
            super().adapter_done(adapter)
            if len(self.done) == 2:
                raise KeyboardInterrupt

    ray = Ray({"CPU": 1.0})
    with pytest.raises(KeyboardInterrupt):
        judged(ray, Interrupts(), output="report", cache="cache")
    assert ray.cancelled == 2
    report = stored()
    assert not report.complete
    assert report.adapters
    assert not report.problems
    again = judged(Ray({"CPU": 1.0}), output="report", cache="cache")
    stored_ones = {one.name for one in report.adapters if one.judged}
    assert stored_ones
    assert {one.name for one in again.adapters if one.cached} >= stored_ones


@pytest.mark.parametrize(
    ("device", "nodes", "asked", "shards"),
    [
        ("auto", [{"CPU": 8.0}, {"CPU": 8.0}], {"num_cpus": 4, "num_gpus": None}, 3),
        ("auto", [{"CPU": 1.0}], {"num_cpus": 1, "num_gpus": None}, 2),
        ("auto", [{"CPU": 64.0}, {"CPU": 16.0, "GPU": 4.0}], {"num_cpus": 4, "num_gpus": 1}, 3),
        ("cpu", [{"CPU": 16.0, "GPU": 4.0}], {"num_cpus": 8, "num_gpus": None}, 3),
    ],
)
def test_a_worker_asks_for_its_share_of_more_shards(
    device: str, nodes: list[dict[str, float]], asked: dict[str, Any], shards: int, quick: Path
) -> None:
    ray = Ray(*nodes)

    def end(work: Any, shard: tuple[int, int], _: Any) -> Iterator[list[Any]]:
        assert work.options.device == ("cuda" if asked["num_gpus"] else device)
        yield [UsageError("enough")]

    ray.run = end
    with pytest.raises(UsageError, match="enough"):
        judged(ray, device=device)
    assert ray.asked == {"num_returns": "streaming", "max_retries": 0, **asked}
    assert [count for _, count in ray.shards] == [shards] * shards


def test_a_note_of_all_nodes_is_shown_once(quick: Path) -> None:
    ray, view = Ray(), Shown()

    def says(work: Any, shard: tuple[int, int], lost_adapters: Any) -> Iterator[list[Any]]:
        yield [("note", ("the sandbox is incomplete",), {}), ("start", ("x", 1, 1), {})]
        yield from run_shard(work, shard, tuple((name, "not now") for name in NAMES))

    ray.run = says
    judged(ray, view)
    assert view.notes.count("the sandbox is incomplete") == 1


# --- a node that does not fit ----------------------------------------------------------------------------------------


def refused(ray: Ray, **options: Any) -> str:
    with pytest.raises(GateError) as caught:
        judged(ray, output="report", **options)
    assert not stored().complete
    return str(caught.value).replace(os.uname().nodename, "<node>").replace(str(Path.cwd()), "<place>")


def test_a_cluster_without_a_processor_ends_the_run(quick: Path, wording: Wording) -> None:
    wording(refused(Ray({"CPU": 0.0})))


def test_a_node_with_other_versions_ends_the_run(quick: Path, wording: Wording) -> None:
    ray = Ray()
    ray.changes = lambda work: replace(work, versions_sha256="0" * 64)
    wording(refused(ray))


def test_a_node_with_another_secret_reuses_and_stores_no_verdict(quick: Path, wording: Wording, variables) -> None:
    variables["MERGE_GATE_CACHE_KEY"] = "a secret of the trusted jobs"
    ray = Ray()
    ray.changes = lambda work: (variables.pop("MERGE_GATE_CACHE_KEY"), work)[1]
    wording(refused(ray, cache="cache"))


def test_a_node_that_does_not_see_where_models_go_merges_nothing(quick: Path, wording: Wording) -> None:
    ray = Ray()
    ray.changes = lambda work: replace(work, mark=f"{Path.cwd()}/elsewhere/.ray-x")
    wording(refused(ray, publish="there"))
    assert not Path("there").exists()


def changed_after(file: Path, address: str = "head:6379", only: tuple[str, ...] = ("one",)) -> Report:
    """The report of a run whose nodes have other bytes in a file than this machine."""
    ray, content = Ray({"CPU": 1.0}), file.read_bytes()

    def run(work: Any, shard: tuple[int, int], lost_adapters: Any) -> Iterator[list[Any]]:
        yield from run_shard(work, shard, lost_adapters)
        file.write_bytes(content + b" ")

    ray.run = run
    try:
        return judged(ray, address=address, only=only)
    finally:
        file.write_bytes(content)


def test_another_adapter_on_a_node_is_a_problem_of_the_report(quick: Path, wording: Wording) -> None:
    file = quick / "one" / "adapter_config.json"
    assert changed_after(file, module.LOCAL).problems == ()
    wording(*changed_after(file).problems)


def test_names_are_those_of_the_configuration(quick: Path, variables) -> None:
    """A combination has the files of its members, and `~` is the home directory."""
    variables["HOME"] = str(quick)
    adapters = [{"path": f"~/{name}", "base": {"model": "~/base"}} for name in NAMES[::2]]
    both = {
        "name": "both",
        "combine": {"adapters": list(NAMES[::2]), "method": "cat", "weights": [1, 1]},
        "base": {"model": "~/base"},
    }
    Path("gate.yml").write_text(json.dumps({"version": 1, "adapters": [*adapters, both]}))
    for names in (NAMES[2:], ("both",)):
        (problem,) = changed_after(quick / NAMES[2] / "adapter_model.safetensors", only=names).problems
        assert "adapter_model.safetensors" in problem


def test_another_base_on_a_node_is_a_problem_of_the_report(place: Path, wording: Wording) -> None:
    report = changed_after(place / "base" / "model.safetensors")
    assert (report.result, report.complete, report.counts.passed) == (Result.ERROR, True, 1)
    wording(*report.problems)


# --- losses ----------------------------------------------------------------------------------------------------------


def test_a_shard_that_is_lost_once_costs_no_verdict(quick: Path) -> None:
    ray, lost = Ray(), list[int]()

    def loses(shard: tuple[int, int], item: Any) -> bool:
        if started("two")(shard, item) and not lost:
            lost.append(shard[0])
            return True
        return False

    ray.loses = loses
    whole = run_gate(load_config("gate.yml"), RunOptions(device="cpu"))
    assert same(judged(ray)) == same(whole)
    assert [index for index, _ in ray.shards].count(lost[0]) == 2


def test_only_an_adapter_that_was_under_way_twice_is_blamed(quick: Path, wording: Wording) -> None:
    ray = Ray({"CPU": 1.0})
    ray.loses = started("one")
    report = judged(ray, access=Access.DOWNLOAD)
    assert report.complete
    assert list(messages(report).values())[1:] == ["merged", "merged"]
    wording(messages(report)["one"])
    assert len(ray.shards) == 4


def test_each_adapter_of_a_lost_shard_has_a_sentence(quick: Path, wording: Wording) -> None:
    ray, view = Ray({"CPU": 1.0}), Shown()
    ray.loses = lambda shard, _: shard[0] == 1
    report = judged(ray, view)
    assert report.complete
    assert [index for index, _ in ray.shards].count(1) == MAX_LOSSES
    assert report.result in {Result.ERROR, Result.FAIL}
    assert {one.name for one in view.done} == set(NAMES)
    wording(*dict.fromkeys(messages(report).values()))


def test_a_task_that_ends_too_early_is_a_loss(quick: Path, wording: Wording) -> None:
    ray = Ray()
    ray.run = lambda *_: iter(())
    said = messages(judged(ray))
    assert set(said) == {"one", "two", "three"}
    wording(*dict.fromkeys(said.values()))


def test_without_a_node_each_adapter_has_a_sentence(quick: Path, wording: Wording) -> None:
    ray = Ray()
    ray.is_silent = lambda: bool(ray.shards) and (ray.resources.clear() or True)
    report = judged(ray)
    assert (report.complete, report.result) == (True, Result.ERROR)
    assert set(messages(report)) == set(NAMES)
    wording(*dict.fromkeys(messages(report).values()))
    assert ray.cancelled == len(ray.shards)


def test_a_silent_cluster_is_waited_for(quick: Path) -> None:
    ray, silences = Ray(), [True, True]
    ray.is_silent = lambda: bool(silences) and silences.pop()
    assert messages(judged(ray, only=("one",))) == {"one": "merged"}


def test_a_report_that_cannot_be_written_is_shown(quick: Path) -> None:
    ray, view = Ray(), Shown()

    def run(work: Any, shard: tuple[int, int], lost_adapters: Any) -> Iterator[list[Any]]:
        yield from run_shard(work, shard, lost_adapters)
        shutil.rmtree("report", ignore_errors=True)
        Path("report").write_text("a file")

    ray.run = run
    with pytest.raises(GateError, match="report is lost"):
        judged(ray, view, output="report", only=("one",))
    assert view.finished == [""]


def test_whatever_ends_a_task_ends_the_run_as_on_one_machine(quick: Path) -> None:
    ray = Ray()
    ray.changes = lambda work: replace(work, config=cast("Any", None))
    with pytest.raises(AttributeError):
        judged(ray)


def test_a_cluster_is_reached_after_the_first_report(quick: Path) -> None:
    begun: list[bool] = []
    with pytest.raises(GateError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        run_gate(
            load_config("gate.yml"), RunOptions(output="report", features={"ray": "127.0.0.1:1"}), view=View(),
            begins=lambda: begun.append(Path("report", "report.json").exists()),
        )  # fmt: skip
    assert begun == [False]
    assert not stored().complete
