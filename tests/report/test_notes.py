"""A note is told where somebody looks for it, and changes neither verdict nor headline nor what is compared."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from typing import TYPE_CHECKING

import pytest

from merge_gate.records.report import BaseReport
from merge_gate.records.terms import Finding, Origin, Quantization, Severity
from merge_gate.report.formats import html_report, json_report, junit, sarif, summary, terminal_text
from merge_gate.report.stored.stored_report import compare
from merge_gate.report.wording import run_result, words
from tests.support.reports import FAILED, PASSED, report

if TYPE_CHECKING:
    from collections.abc import Callable

    from merge_gate.records.report import Report

NOTE = Finding(
    check="base-inconsistent",
    severity=Severity.NOTE,
    message="4 stored tensors are not loaded: mtp.layers.0.proj.weight and 3 more",
    hint="they are not part of the merge",
    origin=Origin.BASE,
)
NOTED = dataclasses.replace(PASSED, findings=(NOTE,))
BASE = BaseReport(model="./models/base", dtype="bfloat16", quantization=Quantization.NONE, findings=(NOTE,))


def test_a_note_changes_neither_headline_nor_exit() -> None:
    noted, plain = report(NOTED, bases=(BASE,)), report(PASSED)
    assert (run_result.headline(noted), noted.result) == (run_result.headline(plain), plain.result)
    assert words.warnings(NOTED) == []
    assert html_report.chain(NOTED) == html_report.chain(PASSED)
    assert compare(plain, noted).changes == ()


def test_an_adapter_with_a_note_alone_has_no_paragraph() -> None:
    shown = terminal_text.render(report(NOTED), "")
    assert NOTE.message not in shown
    of_base = terminal_text.render(report(NOTED, bases=(BASE,)), "")
    assert "note" in of_base
    assert NOTE.message[:20] in of_base
    failed = dataclasses.replace(FAILED, findings=(*FAILED.findings, NOTE))
    assert f"note    {NOTE.check}" in terminal_text.render(report(failed), "")


@pytest.mark.parametrize(
    ("render", "said"),
    [
        (summary.render, f"- note `./models/base` (bfloat16) `{NOTE.check}`"),
        (html_report.render, '<article class="finding note">'),
        (junit.render, f"note {NOTE.check}: "),
        (sarif.render, '"level": "note"'),
    ],
)
def test_every_format_calls_it_a_note(render: Callable[[Report], str], said: str) -> None:
    assert said in render(report(NOTED, bases=(BASE,)))


@pytest.mark.attempt("M3", "a base that one adapter of the run loads as another class", "its note names both, once")
@pytest.mark.parametrize("render", [partial(terminal_text.render, output_dir=""), summary.render, html_report.render])
def test_a_note_on_a_base_comes_once_and_names_class_and_adapter(render: Callable[[Report], str]) -> None:
    encoder = dataclasses.replace(BASE, loaded_as="BertModel", first_adapter="encoder")
    half = dataclasses.replace(encoder, dtype="float16")
    other = dataclasses.replace(BASE, loaded_as="BertForMaskedLM", first_adapter="filler", findings=())
    text = " ".join(render(report(PASSED, bases=(encoder, half, other))).split())
    assert "(bfloat16; float16) as encoder loads it (BertModel)" in text
    assert text.count(NOTE.hint) == 1
    assert "filler" not in text


def test_report_json_has_it_and_it_can_be_read() -> None:
    document = json.loads(json_report.render(report(NOTED)))
    assert document["adapters"][0]["findings"][0]["severity"] == "note"
    assert document["counts"] == {"passed": 1, "failed": 0, "error": 0}
