"""The texts of the last report are reused, and never in another place of the next report."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from merge_gate.report.formats import html_report, json_report
from merge_gate.report.formats.rendered_adapters import RenderedAdapters
from tests.support.reports import FAIL, PASS, adapter, config_file, in_two_dtypes, report, tensors

if TYPE_CHECKING:
    from collections.abc import Callable

    from merge_gate.records.report import AdapterReport, Report

ONE, TWO = adapter("one"), adapter("two")


@pytest.fixture
def made() -> list[str]:
    return []


@pytest.fixture
def make(made: list[str]) -> Callable[[AdapterReport, int], str]:
    def make(adapter: AdapterReport, number: int) -> str:
        made.append(adapter.name)
        return f"{number} {adapter.name}"

    return make


def test_what_the_last_report_had_is_not_made_again(made: list[str], make: Callable[..., str]) -> None:
    rendered = RenderedAdapters()
    assert rendered.texts(make, [ONE], [1]) == ["1 one"]
    assert rendered.texts(make, [TWO, ONE], [0, 1]) == ["0 two", "1 one"]
    assert made == ["one", "two"]


def test_what_is_given_with_it_counts(made: list[str], make: Callable[..., str]) -> None:
    rendered = RenderedAdapters()
    assert rendered.texts(make, [ONE, ONE], [1, 2]) == ["1 one", "2 one"]
    assert rendered.texts(make, [ONE], [1]) == ["1 one"]
    assert made == ["one", "one", "one"]


def test_adapters_are_told_apart_by_identity(made: list[str], make: Callable[..., str]) -> None:
    rendered = RenderedAdapters()
    rendered.texts(make, [ONE], [1])
    rendered.texts(make, [replace(ONE)], [1])
    assert made == ["one", "one"]


def test_what_a_report_no_longer_has_is_forgotten(made: list[str], make: Callable[..., str]) -> None:
    rendered = RenderedAdapters()
    for adapters in ([ONE], [TWO], [ONE]):
        rendered.texts(make, adapters, [1])
    assert made == ["one", "two", "one"]


@pytest.mark.parametrize("render", [json_report.render, html_report.render])
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
def test_a_report_does_not_depend_on_the_one_before(render: Callable[..., str], before: Report, after: Report) -> None:
    rendered = RenderedAdapters()
    same = tuple(map(_the_same_in, [after] * len(before.adapters), before.adapters))
    render(replace(before, adapters=same), rendered)
    assert render(after, rendered) == render(replace(after, adapters=tuple(replace(one) for one in after.adapters)))


def _the_same_in(report: Report, adapter: AdapterReport) -> AdapterReport:
    """The adapter as that report holds it, so that its text is reused."""
    return next((one for one in report.adapters if one == adapter), adapter)


def test_a_map_that_moves_to_another_layout_is_drawn_in_that() -> None:
    other = adapter("other", tensors=tensors(3))
    last = adapter("last", tensors=tensors(2))
    rendered = RenderedAdapters()
    html_report.render(report(last), rendered)
    assert html_report.render(report(other, last), rendered) == html_report.render(
        report(replace(other), replace(last))
    )


@pytest.mark.parametrize(("module", "name"), [(json_report, "_adapter_text"), (html_report, "_row")])
def test_a_renderer_keeps_no_text_of_its_own(module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    make = getattr(module, name)

    def counted(adapter: AdapterReport, *given: object) -> str:
        made.append(adapter.name)
        text: str = make(adapter, *given)
        return text

    monkeypatch.setattr(module, name, counted)
    rendered = RenderedAdapters()
    assert len({module.render(report(ONE), *more) for more in ((), (), (rendered,), (rendered,))}) == 1
    assert made == ["one", "one", "one"]
