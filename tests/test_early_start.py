"""The worker is started before the config is read, and is gone where it is of no use."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from merge_gate.cli.dispatch import main
from merge_gate.config import load_config
from merge_gate.records.config import Config
from merge_gate.report.formats.json_report import read, render
from merge_gate.run import flow
from tests.support.command import children_of
from tests.support.reports import EMPTY


@pytest.fixture
def place(shelf, tmp_path: Path, cwd, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with one sound adapter and its config, and no other directory for what is passing."""
    shutil.copytree(shelf.adapter("plain"), tmp_path / "one")
    write(tmp_path, shelf.base("llama"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return tmp_path


def write(place: Path, base: Path, more: str = "") -> None:
    (place / "gate.yml").write_text(f"version: 1\nbase: {{model: {base}{more}}}\nadapters: [./one]\n")


@pytest.fixture
def cores() -> Iterator[set[int]]:
    every = os.sched_getaffinity(0)
    yield every
    os.sched_setaffinity(0, every)


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The children of this process, whenever a config is read."""
    seen: list[list[int]] = []
    real: Callable[..., Config] = load_config.load_config

    def watched(path: str, **options: Any) -> Config:
        seen.append(children_of(os.getpid()))
        return real(path, **options)

    monkeypatch.setattr(load_config, "load_config", watched)
    return seen


def nothing_is_left(place: Path) -> bool:
    return not children_of(os.getpid()) and not list((place / "tmp").iterdir())


def test_a_config_that_is_refused_leaves_nothing(place: Path, meanwhile: list[list[int]]) -> None:
    (place / "gate.yml").write_text("version: 1\nadapters: 7\n")
    assert main(["run", "gate.yml"]) == 2
    assert [len(children) for children in meanwhile] == [1]
    assert nothing_is_left(place)


@pytest.mark.parametrize("words", [("--ray", "auto"), ("--container",)])
def test_where_another_process_merges_none_is_started(place, meanwhile, words) -> None:
    (place / "gate.yml").write_text("version: 1\nadapters: 7\n")
    assert main(["run", "gate.yml", *words]) == 2
    assert meanwhile == [[]]


def test_it_runs_while_the_config_is_read_and_ends_if_unused(place, meanwhile, cores, monkeypatch) -> None:
    """Where all is known it is gone before the report is made. On one core it is not started before it is needed."""
    assert main(["run", "gate.yml", "--cache", "cache"]) == 0
    assert [len(children) for children in meanwhile] == [1]
    assert nothing_is_left(place)
    left: list[list[int]] = []
    real = flow.supervise

    def watched(*given: Any) -> None:
        left.append(children_of(os.getpid()))
        real(*given)

    monkeypatch.setattr(flow, "supervise", watched)
    for some in (set(sorted(cores)[:1]), cores):
        os.sched_setaffinity(0, some)
        assert main(["run", "gate.yml", "--cache", "cache"]) == 0
        report = read((place / "merge-gate-report" / "report.json").read_bytes(), "report.json")
        assert [one.cached for one in report.adapters] == [True]
        assert len(meanwhile[-1]) == (len(some) > 1)
    assert left == [[], []]
    assert nothing_is_left(place)


def test_where_none_can_be_started_yet_the_run_says_so_itself(place: Path) -> None:
    """An earlier report no longer stands at its place."""
    (place / "merge-gate-report").mkdir()
    (place / "merge-gate-report" / "report.json").write_text(render(EMPTY))
    (place / "tmp").rmdir()
    assert main(["run", "gate.yml"]) == 3
    assert (place / "merge-gate-report" / "report.json").read_text() != render(EMPTY)
