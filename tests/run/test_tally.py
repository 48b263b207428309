"""A report that is written while a run goes on: at a bounded share of the time, and again after a disk was full."""

from pathlib import Path
from typing import Any

import pytest

from merge_gate._internal.errors import ExitCode, GateError, UsageError
from merge_gate._internal.output_files import OUTPUT_FILES
from merge_gate.records.report import Report
from merge_gate.run.tally import PAUSE_RATIO, PROVISIONAL_FORMATS, SENT_EVERY_S, ReportWriter
from merge_gate.run.view import View
from tests.support.reports import EMPTY, FAIL, PASS
from tests.support.wording import Wording

ALL = {one.name for one in OUTPUT_FILES}
COST_S = 2.0
"""What one report costs on this clock."""


class Run:
    """A writer with a clock that moves while a report is made."""

    def __init__(self, directory: Path | None, **view: object) -> None:
        self.now, self.made, self.told = 1000.0, 0, list[str]()
        self.view = View()
        vars(self.view).update({"note": self.told.append} | view)
        self.writer = ReportWriter(str(directory) if directory else None, self.view, lambda: self.now)

    def current(self) -> Report:
        self.made += 1
        self.now += COST_S
        return FAIL

    def judge(self, **how: Any) -> int:
        """An adapter more is judged; how many reports were made by now."""
        self.writer.changed()
        self.writer.catch_up(self.current, **how)
        return self.made


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def run(out: Path) -> Run:
    return Run(out)


def test_a_run_has_all_files_at_its_start_and_at_its_end(run: Run, out: Path) -> None:
    run.writer.write_first(EMPTY)
    assert {one.name for one in out.iterdir()} == ALL
    begun = {name: (out / name).read_bytes() for name in ALL}
    assert run.judge() == 1
    assert {name for name in ALL if (out / name).read_bytes() != begun[name]} == set(PROVISIONAL_FORMATS)
    run.writer.finish(PASS)
    assert {name for name in ALL if (out / name).read_bytes() == begun[name]} == set()


def test_when_it_first_waits_all_files_are_written(run: Run, out: Path) -> None:
    run.writer.write_first(EMPTY)
    begun = {name: (out / name).read_bytes() for name in ALL}
    assert run.judge(at_once=True) == 1
    assert {name for name in ALL if (out / name).read_bytes() == begun[name]} == set()
    run.writer.write_first(EMPTY)
    assert run.judge(at_once=True) == 2
    assert {name for name in ALL if (out / name).read_bytes() != begun[name]} == set(PROVISIONAL_FORMATS)


def test_a_provisional_report_waits_for_its_share_of_the_time(run: Run) -> None:
    assert run.judge() == 1
    run.now += PAUSE_RATIO * COST_S - 0.5
    assert run.judge() == 1, "a moment ago"
    assert run.judge(at_once=True) == 2
    run.now += PAUSE_RATIO * COST_S
    run.writer.catch_up(run.current)
    assert run.made == 2, "nothing has changed"
    assert run.judge() == 3


def test_what_the_first_report_holds_is_not_written_again(run: Run) -> None:
    run.writer.changed()
    run.writer.write_first(FAIL)
    run.writer.catch_up(run.current, at_once=True)
    assert run.made == 0


def test_a_run_without_a_directory_makes_no_report(cwd: Path) -> None:
    run = Run(None)
    run.writer.write_first(EMPTY)
    assert run.judge(at_once=True) == 0
    run.writer.finish(PASS)
    assert not [*cwd.iterdir()]


def test_reports_that_are_sent_have_a_pause_and_are_not_written(cwd: Path) -> None:
    sent: list[Any] = []
    run = Run(None, report_made=sent.append)
    run.writer.write_first(EMPTY)
    assert run.judge() == 1
    run.now += SENT_EVERY_S - 0.5
    assert run.judge() == 1
    run.now += 0.5
    assert run.judge() == 2
    run.writer.finish(PASS)
    assert sent == [EMPTY, FAIL, FAIL, PASS]
    assert not [*cwd.iterdir()]


def test_what_goes_wrong_in_between_is_told_once_and_tried_again(run: Run, out: Path, wording: Wording) -> None:
    out.write_text("a file", encoding="utf-8")
    for _ in range(3):
        run.judge(at_once=True)
    (said,) = run.told
    assert str(out) in said
    wording(said.rpartition("; ")[2])
    out.unlink()
    run.writer.catch_up(run.current, at_once=True)
    assert {one.name for one in out.iterdir()} == set(PROVISIONAL_FORMATS)


def test_a_directory_that_is_none_is_wrong_usage_first(run: Run, out: Path, wording: Wording) -> None:
    out.write_text("a file", encoding="utf-8")
    with pytest.raises(UsageError) as first:
        run.writer.write_first(EMPTY)
    with pytest.raises(GateError) as last:
        run.writer.finish(PASS)
    assert last.value.message.endswith(first.value.message)
    wording(last.value.message.removesuffix(first.value.message))
    assert (last.value.hint, last.value.exit_code) == (first.value.hint, ExitCode.ERROR)
