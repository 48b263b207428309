"""The verdicts of killed runs are found wherever their reports are, and damaged reports are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from merge_gate._internal.earlier_reports import RESUMED, mark_stale
from merge_gate._internal.output_files import OUTPUT_FILES
from merge_gate.cache.key import key_of
from merge_gate.cache.store import Seal
from merge_gate.cache.verdict_cache import CachedVerdict, ResumedVerdicts, forget, sealed
from merge_gate.records.report import AdapterReport, BaseReport, Report
from merge_gate.records.terms import Quantization
from merge_gate.report.formats.json_report import read, render
from merge_gate.report.stored import report_files
from tests.support.reports import SHA256, adapter, report
from tests.support.wording import Wording

BASE = BaseReport(model="./models/base", dtype="bfloat16", quantization=Quantization.NONE, sha256=SHA256)
OTHER = replace(BASE, model="./models/other")
SEAL = Seal()


def material(name: str) -> dict[str, str]:
    return {"adapter": name}


def judged(name: str, seal: Seal = SEAL) -> AdapterReport:
    return sealed(CachedVerdict(adapter=adapter(name), base=BASE), material(name), "a machine", seal).adapter


def killed(*names: str, bases: tuple[BaseReport, ...] = (BASE,)) -> Report:
    """A report of adapters that were judged. One with a name in capitals was not."""
    adapters = (adapter(name) if name.isupper() else judged(name) for name in names)
    return report(*adapters, complete=False, bases=bases)


def resumed(directory: Path, seal: Seal = SEAL) -> ResumedVerdicts:
    return ResumedVerdicts(str(directory), seal)


def bases_of(verdicts: ResumedVerdicts, name: str) -> list[BaseReport]:
    return [found.base for found in verdicts.find(key_of(material(name)), material(name))]


def known(verdicts: ResumedVerdicts, names: str) -> str:
    return "".join(name for name in names if bases_of(verdicts, name))


def test_an_empty_directory_has_no_verdict(tmp_path: Path) -> None:
    verdicts = resumed(tmp_path)
    assert verdicts.is_empty
    verdicts.preserve()
    assert not [*tmp_path.iterdir()]
    forget(str(tmp_path))


def test_a_second_kill_loses_nothing_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(render(killed("a", "b", "C")))
    first = resumed(tmp_path)
    assert known(first, "abcC") == "ab"
    first.preserve()
    assert not read((tmp_path / RESUMED).read_bytes(), RESUMED).complete
    (tmp_path / "report.json").write_text(render(killed("b", "d")))
    assert known(resumed(tmp_path), "abcd") == "abd"
    forget(str(tmp_path))
    assert not (tmp_path / RESUMED).exists()


def test_verdicts_are_found_in_every_earlier_report(tmp_path: Path) -> None:
    """Those in the reports that earlier versions moved aside, too."""
    for name, place in zip("abc", ("previous", "previous-2", "previous-3"), strict=True):
        (tmp_path / place).mkdir()
        (tmp_path / place / "report.json").write_text(render(killed(name)))
    (tmp_path / "report.json").write_text(render(killed("D")))
    verdicts = resumed(tmp_path)
    assert known(verdicts, "abcd") == "abc"
    places = ", ".join(str(tmp_path / name) for name in ("previous", "previous-2", "previous-3"))
    (note,) = verdicts.notes
    assert note.startswith("--resume ")
    assert note.endswith(places)


def test_a_mistake_in_between_keeps_the_verdicts(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(render(killed("a")))
    resumed(tmp_path).preserve()
    (tmp_path / "report.json").write_text(render(killed("b")))
    mark_stale(tmp_path)
    assert known(resumed(tmp_path), "ab") == "ab"


def test_a_verdict_may_be_on_every_base_of_its_name(tmp_path: Path) -> None:
    elsewhere = replace(BASE, sha256="0" * 64)
    (tmp_path / "report.json").write_text(render(killed("a", bases=(OTHER, BASE, elsewhere))))
    assert bases_of(resumed(tmp_path), "a") == [BASE, elsewhere]
    (tmp_path / "report.json").write_text(render(killed("a", bases=(OTHER,))))
    assert bases_of(resumed(tmp_path), "a") == []


def test_a_seal_that_does_not_fit_is_a_miss(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(render(killed("a")))
    assert known(resumed(tmp_path), "a") == "a"
    assert known(resumed(tmp_path, Seal("s" * 32)), "a") == ""
    (tmp_path / "report.json").write_text(render(killed("a", bases=(replace(BASE, parameters=1),))))
    assert known(resumed(tmp_path), "a") == ""


def test_the_output_directory_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "report.json").write_text(render(killed("a")))
    (tmp_path / "link").symlink_to("output")
    assert known(resumed(tmp_path / "link"), "a") == "a"


def test_a_link_and_a_directory_are_not_reports(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "report.json").write_text(render(killed("a")))
    (tmp_path / "report.json").symlink_to("elsewhere/report.json")
    (tmp_path / "previous").symlink_to("elsewhere")
    (tmp_path / RESUMED).mkdir()
    assert resumed(tmp_path).is_empty


def test_a_damaged_report_is_named_and_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wording: Wording
) -> None:
    (tmp_path / "previous").mkdir()
    (tmp_path / "previous" / "report.json").write_text(render(killed("a")))
    (tmp_path / "report.json").write_text(render(killed("b"))[:-9])
    verdicts = resumed(tmp_path)
    assert known(verdicts, "ab") == "a"
    assert str(tmp_path / "report.json") in verdicts.notes[0]
    wording(verdicts.notes[0])
    monkeypatch.setattr(report_files, "OUTPUT_FILES", (OUTPUT_FILES[0]._replace(limit_bytes=100), *OUTPUT_FILES[1:]))
    wording(resumed(tmp_path).notes[-1])
