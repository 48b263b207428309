"""`forward` in a configuration and `--forward`, as whole commands. The worker is played."""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from merge_gate.cli.dispatch import main
from merge_gate.config.load_config import load_config
from merge_gate.records.measured import Forward
from merge_gate.records.terms import ForwardMode
from merge_gate.report.stored.stored_report import stored
from merge_gate.run import flow
from merge_gate.worker import protocol
from tests.support.command import entries
from tests.support.played_merges import played
from tests.support.reports import RAN

pytestmark = pytest.mark.usefixtures("place")

NOT_RUN = {"forward": Forward(why_not="the inputs of Odd are unknown")}
BROKEN = {"unexpected": ("stray",)}


def gate_listened(listen: Callable[..., None], *words: str, changes: dict[str, Any], **config: Any) -> int:
    """`listen` gets what a run gives to its supervisor, and the played one."""
    Path("gate.yml").write_text(json.dumps({"version": 1, "base": "./base", "adapters": ["./one"]} | config))
    with played(Path("base"), changes=changes), pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "supervise", functools.partial(listen, flow.supervise))
        return main(["run", "gate.yml", *words])


def gate(*words: str, changes: dict[str, Any], **config: Any) -> int:
    return gate_listened(lambda supervise, *given: supervise(*given), *words, changes=changes, **config)


def entry() -> dict[str, Any]:
    (one,) = entries(Path("merge-gate-report"))
    return one


@pytest.mark.parametrize(
    ("line", "mode"),
    [
        ("", ForwardMode.AUTO), ("forward: auto", ForwardMode.AUTO), ("forward: required", ForwardMode.REQUIRED),
        ("forward: off", ForwardMode.OFF), ("forward: 'off'", ForwardMode.OFF), ("forward: No", ForwardMode.OFF),
    ],
)  # fmt: skip
def test_whether_models_are_run_is_one_setting_for_all(line: str, mode: ForwardMode) -> None:
    Path("gate.yml").write_text(f"version: 1\nbase: ./base\nadapters: [./one, ./base]\n{line}\n")
    config = load_config("gate.yml")
    assert len(config.adapters) == 2
    assert {spec.forward for spec in config.adapters} == {mode}


def test_a_model_that_was_not_run_is_an_error_only_if_required() -> None:
    assert gate(changes=NOT_RUN) == 0
    assert gate(changes=NOT_RUN, forward="required") == 3
    assert entry()["cause"] == "not-judged"
    assert "Odd" in entry()["findings"][0]["message"]
    assert gate(changes=NOT_RUN | BROKEN, forward="required") == 1, "it is proven broken anyway"
    assert gate(changes={"forward": RAN}, forward="required") == 0
    assert gate("--forward", "required", changes=NOT_RUN) == 3, "the option replaces the key"
    assert gate("--forward", "auto", changes=NOT_RUN, forward="required") == 0
    with played(Path("base"), changes=NOT_RUN):
        assert main(["run", "one", "--base", "base", "--forward", "required"]) == 3


def test_what_the_run_showed_is_in_the_report() -> None:
    assert gate(changes={"forward": RAN}) == 0
    assert entry()["forward"]["largest_module"] == RAN.largest_module
    report = stored("merge-gate-report")
    assert report.adapters[0].forward == RAN


def test_a_report_of_an_earlier_version_has_no_run() -> None:
    assert gate(changes={"forward": RAN}) == 0
    path = Path("merge-gate-report/report.json")
    document = json.loads(path.read_text())
    del document["adapters"][0]["forward"]
    path.write_text(json.dumps(document))
    assert stored("merge-gate-report").adapters[0].forward == Forward()
    assert main(["report", "show", "merge-gate-report"]) == 0


def tasks_of(*words: str, **config: Any) -> list[str | None]:
    """Why the tasks of a run are not to be run as models."""
    reasons: list[str | None] = []

    def listen(supervise: Callable[..., None], job: protocol.Job, *rest: Any) -> None:
        reasons.extend(task.no_forward for group in job.groups for task in group.tasks)
        supervise(job, *rest)

    gate_listened(listen, *words, changes={}, **config)
    return reasons


def test_the_worker_is_told_whether_to_run_the_model() -> None:
    assert tasks_of() == [""]
    assert tasks_of(forward="required") == [""]
    assert tasks_of(forward="off") == ["forward is off"]
    assert tasks_of("--forward", "off", forward="required") == ["forward is off"]


def test_the_setting_counts_in_a_cached_verdict() -> None:
    assert gate("--cache", "cache", changes=NOT_RUN) == 0
    assert gate("--cache", "cache", changes=NOT_RUN, forward="required") == 3
    assert gate("--cache", "cache", changes=NOT_RUN) == 0
    assert entry()["cached"]


def test_a_verdict_whose_model_died_is_not_stored() -> None:
    """More memory, or a machine that is less busy, has the measurement next time."""

    def dies(supervise: Callable[..., None], job: protocol.Job, on_event: Callable[..., None], *rest: Any) -> None:
        def heard(event: protocol.Event) -> None:
            if isinstance(event, protocol.Merged):
                on_event(protocol.ForwardRunning(task=event.task, is_running=True))
            on_event(event)

        supervise(job, heard, *rest)

    assert gate_listened(dies, "--cache", "cache", changes=NOT_RUN) == 0
    for is_cached in (False, True):
        assert gate("--cache", "cache", changes={"forward": RAN}) == 0
        assert entry()["cached"] is is_cached


@pytest.mark.parametrize("forward", [replace(RAN, missing=True), Forward(why_not="no memory", missing=True)])
def test_a_verdict_without_enough_memory_is_not_stored(forward: Forward) -> None:
    for _ in range(2):
        assert gate("--cache", "cache", changes={"forward": forward}) == 0
        assert not entry()["cached"]
    for is_cached in (False, True):
        assert gate("--cache", "cache", changes={"forward": replace(forward, missing=False)}) == 0
        assert entry()["cached"] is is_cached
