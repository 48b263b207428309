"""What killed runs have left is put together, and what cannot be read is said."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from merge_gate.cache.resume import LEFT, Left, forget, left_in
from merge_gate.errors import UsageError
from merge_gate.records.report import BaseReport, Judged, Report
from merge_gate.records.terms import Quantization
from merge_gate.report.json_report import render
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
    assert known(left_in(str(tmp_path)), "abc") == "ab"
    (tmp_path / "report.json").write_text(render(killed("b", "d")))
    left = left_in(str(tmp_path))
    assert (len(left), known(left, "abcd")) == (3, "abd")
    forget(str(tmp_path))
    assert not (tmp_path / LEFT).exists()


def test_an_adapter_is_left_with_every_base_of_its_name(tmp_path: Path) -> None:
    elsewhere = replace(BASE, sha256="0" * 64)
    (tmp_path / "report.json").write_text(render(killed("a", bases=(OTHER, BASE, elsewhere))))
    assert [one.base for one in left_in(str(tmp_path)).of("a" * 64)] == [BASE, elsewhere]
    (tmp_path / "report.json").write_text(render(killed("a", bases=(OTHER,))))
    (tmp_path / LEFT).unlink()
    assert left_in(str(tmp_path)).of("a" * 64) == []


def test_a_link_and_a_directory_are_no_report(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.json").write_text(render(killed("a")))
    (tmp_path / "report.json").symlink_to("elsewhere.json")
    (tmp_path / LEFT).mkdir()
    assert len(left_in(str(tmp_path))) == 0


def test_a_report_that_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(UsageError, match="is not a report of merge-gate"):
        left_in(str(tmp_path))

    def gives_out(path: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Path, "read_bytes", gives_out)
    with pytest.raises(UsageError, match="cannot be read, so there is nothing to resume: Input/output"):
        left_in(str(tmp_path))
