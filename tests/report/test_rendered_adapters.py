"""The texts of the last report are reused, and never in another place of the next report."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from merge_gate.report.formats import json_report
from merge_gate.report.formats.json_report import RenderedAdapters
from tests.support.reports import FAIL, PASS, adapter, config_file, in_two_dtypes, report

if TYPE_CHECKING:
    from collections.abc import Callable

    from merge_gate.records.report import AdapterReport, Report

ONE, TWO = adapter("one"), adapter("two")


@pytest.fixture
def made() -> list[str]:
    return []


@pytest.fixture
def make(made: list[str]) -> Callable[[AdapterReport], str]:
    def make(adapter: AdapterReport) -> str:
        made.append(adapter.name)
        return adapter.name

    return make


def test_what_the_last_report_had_is_not_made_again(made: list[str], make: Callable[..., str]) -> None:
    rendered = RenderedAdapters()
    assert rendered.texts(make, [ONE]) == ["one"]
    assert rendered.texts(make, [TWO, ONE, ONE]) == ["two", "one", "one"]
    assert made == ["one", "two"]


def test_adapters_are_told_apart_by_identity(made: list[str], make: Callable[..., str]) -> None:
    rendered = RenderedAdapters()
    rendered.texts(make, [ONE])
    rendered.texts(make, [replace(ONE)])
    assert made == ["one", "one"]


def test_what_a_report_no_longer_has_is_forgotten(made: list[str], make: Callable[..., str]) -> None:
    rendered = RenderedAdapters()
    for adapters in ([ONE], [TWO], [ONE]):
        rendered.texts(make, adapters)
    assert made == ["one", "two", "one"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (PASS, FAIL),
        (FAIL, PASS),
        (FAIL, replace(FAIL, config=config_file("elsewhere.yml"))),
        (FAIL, replace(FAIL, adapters=FAIL.adapters[::-1])),
        (replace(in_two_dtypes(), adapters=in_two_dtypes().adapters[1:]), in_two_dtypes()),
    ],
)
def test_a_report_does_not_depend_on_the_one_before(before: Report, after: Report) -> None:
    rendered = RenderedAdapters()
    same = tuple(map(_the_same_in, [after] * len(before.adapters), before.adapters))
    json_report.render(replace(before, adapters=same), rendered)
    assert json_report.render(after, rendered) == json_report.render(
        replace(after, adapters=tuple(replace(one) for one in after.adapters))
    )


def _the_same_in(report: Report, adapter: AdapterReport) -> AdapterReport:
    """The adapter as that report holds it, so that its text is reused."""
    return next((one for one in report.adapters if one == adapter), adapter)


def test_the_renderer_keeps_no_text_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    make = json_report._adapter_text

    def counted(adapter: AdapterReport) -> str:
        made.append(adapter.name)
        return make(adapter)

    monkeypatch.setattr(json_report, "_adapter_text", counted)
    rendered = RenderedAdapters()
    assert len({json_report.render(report(ONE), *more) for more in ((), (), (rendered,), (rendered,))}) == 1
    assert made == ["one", "one", "one"]
