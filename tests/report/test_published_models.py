"""The published models of a run, in summary.md and in report.html."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from merge_gate.records.files import HashedFile
from merge_gate.records.report import PublishedModel
from merge_gate.records.terms import Verdict
from merge_gate.report.formats import html_report, summary
from tests.support import reports

GOLDENS = Path(__file__).parent / "goldens"
MANIFEST = HashedFile(path="merge-gate.json", size_bytes=5_000, sha256="ab" * 32)
WEIGHTS = HashedFile(path="model.safetensors", size_bytes=2_200_000_000, sha256="cd" * 32)


def model(directory: str, *files: HashedFile, dtype: str = "preserve") -> PublishedModel:
    return PublishedModel(directory=directory, dtype=dtype, files=files)


REPORT = reports.report(
    reports.adapter("support", published=model("merged/support", MANIFEST, WEIGHTS)),
    reports.adapter("small", published=model("merged/small-bfloat16", MANIFEST, dtype="bfloat16")),
    reports.adapter("<b>|`", published=model("merged/<img src=x>|`\u202e", WEIGHTS)),
    reports.adapter("judged"),
)


def section(text: str, start: str, end: str) -> str:
    return start + text.partition(start)[2].partition(end)[0] + "\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("published.md", section(summary.render(REPORT), "| published model |", "\n\n")),
        ("published.html", section(html_report.render(REPORT), '<section aria-labelledby="published">', "</section>")),
    ],
)
def test_published_models_are_shown_escaped(name: str, text: str) -> None:
    golden = GOLDENS / name
    if os.environ.get("UPDATE_GOLDENS"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8"), "look at the difference, then run with UPDATE_GOLDENS=1"
    assert "judged" not in text
    assert "<img" not in text.replace("`", "") or name.endswith(".md")
    assert "\u202e" not in text


def test_a_run_that_publishes_nothing_shows_nothing() -> None:
    report = reports.report(reports.adapter(), reports.adapter("other", Verdict.ERROR))
    assert "published model" not in summary.render(report)
    assert "Published models" not in html_report.render(report)


def test_many_models_fit_into_the_summary() -> None:
    long = "merged/" + "x" * 140
    many = reports.report(*(reports.adapter(f"a{n}", published=model(long, MANIFEST)) for n in range(200)))
    text = summary.render(many)
    assert "more model" in text
    assert len(text.encode()) < 64 * 1024
