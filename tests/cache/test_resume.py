"""What killed runs have left is put together, and what cannot be read is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from merge_gate.cache import resume
from merge_gate.cache.resume import Left, forget, left_in
from merge_gate.earlier_reports import RESUMED, move_aside
from merge_gate.records.report import BaseReport, Judged, Report
from merge_gate.records.terms import Quantization
from merge_gate.report.formats.json_report import render
from tests.support.reports import SHA256, adapter, report

BASE = BaseReport(model="./models/base", dtype="bfloat16", quantization=Quantization.NONE, sha256=SHA256)
OTHER = replace(BASE, model="./models/other")


def judged(name: str) -> Judged:
    return Judged(key=name[0] * 64, at="2026-03-01T12:00:00Z", place="a machine", seconds=0.5, seal=SHA256)


def killed(*names: str, bases: tuple[BaseReport, ...] = (BASE,)) -> Report:
    """A report of adapters that were judged; of one in capitals that was not."""
    return report(
        *(adapter(name, judged=None if name.isupper() else judged(name)) for name in names),
        complete=False,
        bases=bases,
    )


def known(left: Left, names: str) -> str:
    return "".join(name for name in names if left.of(name * 64))


def test_nothing_is_left_of_an_empty_directory(tmp_path: Path) -> None:
    assert len(left_in(str(tmp_path))) == 0
    assert not [*tmp_path.iterdir()]
    forget(str(tmp_path))


def test_a_second_kill_loses_nothing_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(render(killed("a", "b", "C")))
    first = left_in(str(tmp_path))
    assert known(first, "abc") == "ab"
    first.keep(str(tmp_path))
    (tmp_path / "report.json").write_text(render(killed("b", "d")))
    left = left_in(str(tmp_path))
    assert (len(left), known(left, "abcd")) == (3, "abd")
    forget(str(tmp_path))
    assert not (tmp_path / RESUMED).exists()


def test_verdicts_are_found_wherever_a_mistake_has_moved_them(tmp_path: Path) -> None:
    """The newest report, those that usage errors moved, and the file of a run that went on from others."""
    for name in "abc":
        (tmp_path / "report.json").write_text(render(killed(name)))
        left_in(str(tmp_path)).keep(str(tmp_path))
        move_aside(tmp_path)
    (tmp_path / "report.json").write_text(render(killed("D")))
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "previous", "previous-2", "previous-3"}
    left = left_in(str(tmp_path))
    assert known(left, "abcd") == "abc"
    assert [place.name for place in left.places] == ["previous", "previous-2", "previous-3"]
    assert left.notes == [f"--resume reuses the verdicts in {', '.join(map(str, left.places))}"]


def test_an_adapter_is_left_with_every_base_of_its_name(tmp_path: Path) -> None:
    elsewhere = replace(BASE, sha256="0" * 64)
    (tmp_path / "report.json").write_text(render(killed("a", bases=(OTHER, BASE, elsewhere))))
    assert [one.base for one in left_in(str(tmp_path)).of("a" * 64)] == [BASE, elsewhere]
    (tmp_path / "report.json").write_text(render(killed("a", bases=(OTHER,))))
    assert left_in(str(tmp_path)).of("a" * 64) == []


def test_a_link_and_a_directory_are_no_report(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "report.json").write_text(render(killed("a")))
    (tmp_path / "report.json").symlink_to("elsewhere/report.json")
    (tmp_path / "previous").symlink_to("elsewhere")
    (tmp_path / RESUMED).mkdir()
    assert len(left_in(str(tmp_path))) == 0


def test_a_damaged_report_is_named_and_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "previous").mkdir()
    (tmp_path / "previous" / "report.json").write_text(render(killed("a")))
    (tmp_path / "report.json").write_text(render(killed("b"))[:-9])
    left = left_in(str(tmp_path))
    assert known(left, "ab") == "a"
    assert left.notes[0] == f"{tmp_path / 'report.json'} is damaged, so none of its verdicts are reused"
    monkeypatch.setattr(resume, "LONGEST_BYTES", 100)
    assert left_in(str(tmp_path)).notes[-1].startswith("nothing to resume: the output directory holds no verdict")
