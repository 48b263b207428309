"""What one run keeps another takes over, as long as base, adapter, secret and device are the same."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest

from merge_gate.cache import keeper as module
from merge_gate.cache.keeper import Keeper, base_directory
from merge_gate.cache.resume import Left
from merge_gate.records.files import Entry
from merge_gate.records.terms import Verdict
from merge_gate.worker.protocol import DeviceChosen, Event, Idle, Job
from tests.support.cache.keepers import CPU, keep, keeper
from tests.support.cache.lines import based_entry, entry, line
from tests.support.reports import report

if TYPE_CHECKING:
    from collections.abc import Callable

    from merge_gate.cache.verdicts import Line

CARD = DeviceChosen(device="cuda", device_name="a card")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def one(tmp_path: Path) -> Entry:
    return based_entry(tmp_path)


def taken_over(run: Keeper, one: Entry) -> bool:
    found = dict(run.take_over([(7, one)]))
    assert all(index == 7 and judged.adapter.cached for index, judged in found.items())
    return bool(found)


def test_what_was_kept_is_taken_over(one: Entry) -> None:
    with closing(keeper(one)) as first:
        assert not taken_over(first, one)
        kept = keep(first, one)
    assert kept is not None
    assert kept.adapter.judged is not None
    with closing(keeper(one)) as second:
        assert taken_over(second, one)
    with closing(keeper(one, fresh=True)) as anew:
        assert not taken_over(anew, one)
    with closing(keeper(one, secret="a secret of this test")) as distrustful:
        assert not taken_over(distrustful, one)


def test_without_a_directory_a_verdict_has_its_mark_all_the_same(one: Entry) -> None:
    with closing(keeper(one, cache=False)) as run:
        kept = keep(run, one)
        assert not taken_over(run, one)
    assert kept is not None
    assert kept.adapter.judged is not None


def left_by(kept: Line | None) -> Left:
    """What a killed run has left that had judged one adapter."""
    assert kept is not None
    return Left(report(kept.adapter, complete=False, bases=(kept.base,)), places=(Path("killed"),))


def test_what_a_killed_run_has_left_is_taken_over_without_a_cache(one: Entry, tmp_path: Path) -> None:
    with closing(keeper(one, cache=False)) as killed:
        left = left_by(keep(killed, one))
    notes: list[str] = []
    with closing(keeper(one, cache=False, left=left, notify=notes.append)) as next_run:
        assert taken_over(next_run, one)
        other = entry(tmp_path / "other", data=b"other")
        assert not taken_over(next_run, replace(other, base=one.base))
    with closing(
        keeper(one, cache=False, left=left, secret="a secret of this test", notify=notes.append)
    ) as distrustful:
        assert not taken_over(distrustful, one)
    assert len(notes) == 2
    assert all("killed" in note for note in notes)


def test_what_is_left_of_another_commit_of_the_base_is_judged_again(one: Entry) -> None:
    """The seal fits whatever the line says; it must speak of this run's base."""
    with closing(keeper(one, cache=False)) as killed:
        killed.device_chosen(CPU)
        killed.digests.start(base_directory(one))
        killed.digests.wait()
        judged = line(one)
        of_main = replace(judged.adapter.base, revision="main")
        left = left_by(
            killed.keep(
                one,
                replace(
                    judged,
                    adapter=replace(judged.adapter, base=of_main),
                    base=replace(judged.base, revision="main"),
                ),
            )
        )
    with closing(keeper(one, left=left, fresh=True, notify=[].append)) as next_run:
        assert next_run.looks_back
        assert not taken_over(next_run, one)


# --- what may not be kept --------------------------------------------------------------------------------------------


def rewrite(one: Entry) -> None:
    Path(one.members[0].directory, WEIGHTS).write_bytes(b"WEIGHTS")


def remove(one: Entry) -> None:
    Path(one.members[0].directory, WEIGHTS).unlink()


@pytest.mark.parametrize("change", [rewrite, remove])
def test_an_adapter_that_is_no_longer_what_was_hashed_is_neither_kept_nor_taken_over(
    one: Entry, change: Callable[[Entry], None]
) -> None:
    with closing(keeper(one)) as run:
        assert keep(run, one) is not None
        change(one)
        assert keep(run, one) is None
    with closing(keeper(one)) as run:
        assert not taken_over(run, one)


def test_a_verdict_on_a_base_that_cannot_be_hashed_is_neither_kept_nor_taken_over(one: Entry) -> None:
    with closing(keeper(one)) as run:
        assert keep(run, one) is not None
    Path(base_directory(one), "model.safetensors").unlink()
    with closing(keeper(one)) as run:
        assert not taken_over(run, one)
        assert keep(run, one) is None


def test_a_base_that_changes_after_it_was_hashed_is_not_the_one(one: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(keeper(one)) as run:
        keep(run, one)
    with closing(keeper(one)) as run:
        wait = run.digests.wait

        def wait_and_write() -> None:
            wait()
            os.utime(Path(base_directory(one), "model.safetensors"), ns=(1, 1))

        monkeypatch.setattr(run.digests, "wait", wait_and_write)
        assert not taken_over(run, one)


def test_nothing_is_kept_before_it_is_known_what_it_rests_on(one: Entry) -> None:
    with closing(keeper(one)) as run:
        assert run.keep(one, line(one)) is None
        run.device_chosen(CPU)
        assert run.keep(one, line(one)) is None, "the base is not hashed yet"
    with closing(keeper(one)) as run:
        assert keep(run, one, verdict=Verdict.ERROR) is None, "no verdict"


def test_an_entry_that_was_to_be_settled_before_is_a_bug(one: Entry) -> None:
    with pytest.raises(AssertionError, match="settled before it is looked for"):
        base_directory(replace(one, base=None))


# --- the device ------------------------------------------------------------------------------------------------------


class Worker:
    """A worker process that is asked for its device."""

    asked = 0

    def __init__(self, *says: Event) -> None:
        self._says = says

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was started."""

    def run(self, job: Job, listen: Callable[[Event], None], **_: object) -> None:
        assert not job.groups, "it is to merge nothing"
        Worker.asked += 1
        for event in self._says:
            listen(event)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set what a worker says from here on."""
    monkeypatch.setattr(module, "has_card", lambda: True)
    monkeypatch.setattr(Worker, "asked", 0)
    return lambda *says: monkeypatch.setattr(module, "WorkerProcess", lambda: Worker(*says))


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_card_is_asked_for_once_until_the_machine_starts_anew(
    one: Entry, worker: Callable[..., None], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker(Idle(), CARD)
    with closing(keeper(one, device=wanted)) as run:
        assert keep(run, one, CARD) is not None
    for times, start in ((0, None), (1, "another start"), (1, "another start")):
        if start is not None:
            monkeypatch.setattr(module, "this_start", lambda: "another start")
        with closing(keeper(one, device=wanted)) as run:
            assert taken_over(run, one)
            assert (run.device, run.device_name) == ("cuda", "a card")
        assert Worker.asked == times


def test_where_no_start_is_told_from_another_the_card_is_asked_each_time(
    one: Entry, worker: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "this_start", lambda: None)
    worker(CARD)
    with closing(keeper(one, device="cuda")) as run:
        assert keep(run, one, CARD) is not None
    for times in (1, 2):
        with closing(keeper(one, device="cuda")) as run:
            assert taken_over(run, one)
        assert Worker.asked == times


def test_a_verdict_of_another_device_is_not_taken_over(one: Entry, worker: Callable[..., None]) -> None:
    worker(CARD)
    with closing(keeper(one)) as run:
        assert keep(run, one) is not None
    with closing(keeper(one, device="cuda")) as run:
        assert not taken_over(run, one)
    with closing(keeper(one)) as run:
        assert taken_over(run, one)


def test_a_card_that_does_not_answer_leaves_all_to_be_judged(one: Entry, worker: Callable[..., None]) -> None:
    """The run's own worker says what is wrong."""
    worker()
    with closing(keeper(one)) as run:
        assert keep(run, one) is not None
    with closing(keeper(one, device="cuda")) as run:
        assert not taken_over(run, one)


@pytest.mark.parametrize("record", [{"device": 1, "name": "a card"}, {"device": "cuda"}, []])
def test_a_record_of_a_device_that_is_none_is_not_believed(
    one: Entry, worker: Callable[..., None], record: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker(CARD)
    with closing(keeper(one, device="cuda")) as run:
        keep(run, one, CARD)
        monkeypatch.setattr(run._store, "get", lambda kind, _: record if kind == "devices" else None)
        assert taken_over(run, one)
    assert Worker.asked == 1
