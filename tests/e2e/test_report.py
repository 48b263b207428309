"""The report in a real browser, on a desk and a phone, by day and by night, for 7 adapters and for 500; SARIF against
the standard's own schema; junit.xml in the library that EnricoMi's action reads it with.

Chromium comes from Debian, axe-core and Playwright from PyPI, the schema from an npm package: .ci/install-e2e.sh.
Screenshots are left in $MERGE_GATE_SCREENSHOTS where that names a directory.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import junitparser
import pytest
from axe_playwright_python.sync_playwright import Axe

from merge_gate.records.terms import Verdict
from merge_gate.report.formats import html_report, junit, sarif
from tests.support import reports
from tests.support.e2e.browser import chromium
from tests.support.large_report import fleet
from tests.support.reports import ATTACKS, NAN, adapter, report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Page

    from merge_gate.records.report import AdapterReport, Report

pytestmark = pytest.mark.e2e

SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
OPENS_WITHIN_S = 10.0


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@dataclasses.dataclass
class Visit:
    """A page that was opened from disk, and what it said and asked for meanwhile."""

    page: Page
    seconds: float
    complaints: list[str]
    requests: list[str]


@pytest.fixture
def visit(browser: Browser, tmp_path: Path) -> Iterator[Any]:
    contexts = []

    def go(run: Report, size: str = "desktop", scheme: Any = "light") -> Visit:
        path = tmp_path / "report.html"
        path.write_text(html_report.render(run), encoding="utf-8")
        context = browser.new_context(viewport=SIZES[size], color_scheme=scheme)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        seen = Visit(page, 0.0, [], [])
        page.on("console", lambda message: seen.complaints.append(message.text))
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        page.on("dialog", lambda dialog: seen.complaints.append(dialog.message))
        page.on("request", lambda request: seen.requests.append(request.url))
        began = time.monotonic()
        page.goto(path.as_uri())
        page.locator("#shown").filter(has_text="of").wait_for(state="attached")
        seen.seconds = time.monotonic() - began
        return seen

    yield go
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [7, 500])
def test_it_opens_fast_quietly_and_for_everybody(visit: Any, count: int, size: str, scheme: str) -> None:
    seen: Visit = visit(fleet(count), size, scheme)
    page = seen.page
    assert seen.seconds < OPENS_WITHIN_S
    assert page.locator("tbody.adapter").count() == count
    cells = 224 if count == 7 else 0  # the worst adapter is open, its map drawn, if fewer than ten failed
    assert page.locator(".opened .heat td[data-index]").count() == cells
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size]["width"], "nothing sticks out"
    if directory := os.environ.get("MERGE_GATE_SCREENSHOTS"):
        page.screenshot(path=str(Path(directory) / f"report-{count}-{size}-{scheme}.png"), full_page=count < 100)
    if count < 100:
        serious = [one for one in Axe().run(page).response["violations"] if one["impact"] in {"serious", "critical"}]
        assert [(one["id"], [node["html"][:200] for node in one["nodes"][:3]]) for one in serious] == []
    assert seen.complaints == []
    assert [url for url in seen.requests if not url.startswith("file:")] == []
    assert len(seen.requests) == 1


def test_a_phone_s_first_screen_says_what_failed_and_what_to_do(visit: Any) -> None:
    page: Page = visit(fleet(7), "phone").page
    height = SIZES["phone"]["height"]
    opened = page.locator("tbody.opened")
    for told in (opened.locator(".open"), opened.locator(".message").first, opened.locator(".hint").first):
        box = told.bounding_box()
        assert box is not None
        assert box["y"] + box["height"] <= height


def test_all_of_it_is_reachable_by_keyboard(visit: Any) -> None:
    page: Page = visit(fleet(7)).page
    reached: list[str] = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "(e => e.dataset.pick ?? e.dataset.sort ?? (e.className || e.id || e.type))(document.activeElement)"
            )
        )
    for wanted in ("failed", "filter", "name", "cause", "open", "radio", "F"):
        assert wanted in reached, wanted
    page.locator(".open", has_text="team-003").focus()
    page.keyboard.press("Enter")
    opened = page.locator("tbody.opened", has_text="team-003")
    opened.locator("input[value=state]").focus()
    page.keyboard.press("ArrowRight")
    assert opened.locator("input[value=headroom]").is_checked()
    page.keyboard.press("Tab")
    if page.evaluate("document.activeElement.className") == "scroll":  # a region that scrolls is a stop of its own
        page.keyboard.press("Tab")
    read = opened.locator(".read")
    assert read.inner_text().startswith("model.layers.0.self_attn.q_proj.weight (2048 x 2048, float16): finite")
    for key in ["ArrowDown"] * 5 + ["ArrowRight"] * 17:
        page.keyboard.press(key)
    assert read.inner_text().startswith("model.layers.17.mlp.up_proj.weight (2048 x 2048, float16): ±Inf; 12 +Inf")
    page.keyboard.press("Home")
    assert read.inner_text().startswith("model.layers.0.mlp.up_proj.weight")


def test_hover_and_tap_give_the_numbers(visit: Any) -> None:
    page: Page = visit(fleet(7)).page
    opened = page.locator("tbody.opened")
    opened.locator("td[data-index='35']").hover()
    read = opened.locator(".read")
    assert read.inner_text() == (
        "model.layers.5.self_attn.q_proj.weight (2048 x 2048, bfloat16): NaN; 17 NaN, the first at [311, 2040]; "
        "finite values -0.5 to 0.741; headroom used below 0.01 %; ‖ΔW‖/‖W‖ 0.00116, "
        "estimated from a sample; "
        "rounding loss 0.167 %, estimated from a sample"
    )
    opened.locator("td[data-index='36']").click()
    assert read.inner_text().startswith("model.layers.5.self_attn.k_proj.weight")


def test_the_table_sorts_and_filters(visit: Any) -> None:
    page: Page = visit(fleet(14)).page
    names = page.locator("tbody.adapter:visible .open")
    assert names.all_inner_texts()[:3] == ["team-001", "team-003", "team-008"]
    page.get_by_role("button", name="adapter", exact=True).click()
    assert names.all_inner_texts() == [f"team-{index:03d}" for index in range(14)]
    page.get_by_role("button", name="adapter", exact=True).click()
    assert names.all_inner_texts()[0] == "team-013"
    page.locator(".counts .failed").click()
    assert sorted(names.all_inner_texts()) == ["team-001", "team-003", "team-008", "team-010"]
    page.get_by_label("Filter").fill("MERGED-nonfinite team-010")
    assert names.all_inner_texts() == ["team-010"]
    assert page.locator("#shown").inner_text() == "1 of 14"
    page.get_by_label("Filter").fill("no such adapter")
    assert page.locator("#none").is_visible()


def test_an_address_opens_its_adapter_and_paper_shows_all(visit: Any) -> None:
    page: Page = visit(fleet(7)).page
    page.evaluate("location.hash = '#adapter-team-005'")
    page.locator("#adapter-team-005.opened .heat").wait_for()
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("tbody.opened").count() == 4


def test_hostile_names_are_inert(visit: Any) -> None:
    def evil(text: str, number: int) -> AdapterReport:
        finding = dataclasses.replace(NAN, message=text, hint=text, tensor=text, module=text, check=text)
        merges = tuple(
            dataclasses.replace(
                merge, module=f"{text}.{at}.q", stats=dataclasses.replace(merge.stats, name=f"{text}.{at}.q.w")
            )
            for at, merge in enumerate(reports.tensors(1))
        )
        return adapter(
            f"{number}{text}",
            Verdict.FAILED,
            cause=text,
            findings=(finding,),
            source=text,
            revision=text,
            tensors=merges,
        )

    attacks = [*ATTACKS, "</script><script>alert(1)</script>", "]]>", "<!--<script>", "{{ 7 * 7 }}", "'-alert(1)-'"]
    seen: Visit = visit(report(*(evil(text, number) for number, text in enumerate(attacks))))
    page = seen.page
    assert page.locator("tbody.adapter").count() == len(attacks)
    page.evaluate("document.querySelectorAll('.open[aria-expanded=false]').forEach(button => button.click())")
    assert page.locator("tbody.opened .heat").count() == len(attacks)
    assert page.locator("main script:not([type='application/json']), main img, main a, iframe").count() == 0
    assert "49" not in page.locator("tbody.adapter", has_text="7 * 7").first.locator(".open").inner_text()
    assert seen.complaints == []
    assert len(seen.requests) == 1


def test_without_a_script_everything_is_there_to_read(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(html_report.render(fleet(7)), encoding="utf-8")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    for said in (NAN.message, NAN.hint, "1 NaN, 223 finite", "448 of 448 adapter tensors used"):
        assert page.get_by_text(said).first.is_visible()
    context.close()


@pytest.mark.parametrize(
    "run", [fleet(7), reports.EMPTY, reports.PASS, report(*(adapter(text, findings=(NAN,)) for text in ATTACKS))]
)
def test_sarif_is_as_the_standard_has_it(home: Path, run: Report) -> None:
    schema = json.loads((home / "sarif-2.1.0.json").read_text(encoding="utf-8"))
    jsonschema.validators.validator_for(schema)(schema).validate(json.loads(sarif.render(run)))


@pytest.mark.parametrize("count", [7, 500])
def test_the_library_of_a_junit_reader_counts_as_we_do(tmp_path: Path, count: int) -> None:
    run = fleet(count)
    path = tmp_path / "junit.xml"
    path.write_text(junit.render(run), encoding="utf-8")
    suites = list(junitparser.JUnitXml.fromfile(str(path)))
    verdicts = [adapter.verdict for adapter in run.adapters]
    assert sum(suite.tests for suite in suites) == count
    assert sum(suite.failures for suite in suites) == verdicts.count(Verdict.FAILED)
    assert sum(suite.errors for suite in suites) == verdicts.count(Verdict.ERROR)
    assert sum(bool(case.result) for suite in suites for case in suite) == count - verdicts.count(Verdict.PASSED)


def test_a_hostile_name_is_text_for_that_library_too(tmp_path: Path) -> None:
    run = report(*(adapter(f"{n}{attack}", Verdict.FAILED, findings=(NAN,)) for n, attack in enumerate(ATTACKS)))
    path = tmp_path / "junit.xml"
    path.write_text(junit.render(run), encoding="utf-8")
    cases = [case for suite in junitparser.JUnitXml.fromfile(str(path)) for case in suite]
    assert [len(case.result) for case in cases] == [1] * len(ATTACKS)
