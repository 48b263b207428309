"""A model whose files have other names than the model: comparing names as they are misjudges 56 of 57 tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from merge_gate.records.terms import Severity, Verdict
from tests.support.gating import one_thread
from tests.support.verify import qwen_vl
from tests.support.verify.merges import weights_of, write_weights
from tests.support.verify.verification import Verifier

if TYPE_CHECKING:
    from pathlib import Path

    from merge_gate.records.report import AdapterReport


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("qwen")
    with one_thread():
        qwen_vl.make_base(root / "base")
        qwen_vl.make_adapter(root / "base", root / "adapter")
        qwen_vl.make_merge(root / "base", root / "adapter", root / "merged")
        qwen_vl.rename(root / "merged", root / "renamed")
    return root


def reported(place: Path, merged: Path, *allowed: str) -> AdapterReport:
    with one_thread():
        return Verifier().report(merged, place / "base", place / "adapter", allowed=allowed)


def errors(report: AdapterReport) -> list[str]:
    return [one.check for one in report.findings if one.severity is Severity.ERROR]


def test_the_names_differ_nearly_everywhere(place: Path) -> None:
    assert len(weights_of(place / "base")) == 57
    assert qwen_vl.naive_matches(place / "base") == 1


def test_the_merge_is_named(place: Path) -> None:
    report = reported(place, place / "merged")
    assert report.verdict is Verdict.PASSED, report.findings
    assert [one.check for one in report.findings if one.severity is Severity.NOTE][-1] == "exact"


def test_other_names_are_named_and_nothing_else(place: Path) -> None:
    report = reported(place, place / "renamed")
    assert errors(report) == ["renamed"]
    assert dict(report.findings[0].measured)["tensors"] == 56
    assert reported(place, place / "renamed", "renamed").verdict is Verdict.PASSED


def test_a_lost_tower_is_named_under_either_names(place: Path, tmp_path: Path) -> None:
    for source, part in (("merged", "visual.blocks.1."), ("renamed", "model.visual.blocks.1.")):
        out = tmp_path / source
        out.mkdir()
        (out / "config.json").write_bytes((place / source / "config.json").read_bytes())
        tensors = weights_of(place / source)
        lost = [name for name in tensors if name.startswith(part)]
        write_weights(out, {name: one for name, one in tensors.items() if name not in lost})
        found = errors(reported(place, out, "renamed"))
        assert found == ["not-carried"], (source, found)
