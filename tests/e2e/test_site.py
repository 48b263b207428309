"""The documentation's site in a real browser, from a local server: every page on a desk, and some on a phone at night.

Screenshots are left in $MERGE_GATE_SCREENSHOTS if that names a directory.
"""

from __future__ import annotations

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from axe_playwright_python.sync_playwright import Axe

from merge_gate import __version__
from tests.support.e2e.browser import chromium
from website.build import ROOT, SitePage, site_pages

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.e2e

PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 900}
OF_EACH_KIND = ("index.md", "guides/github-actions.md", "reference/configuration.md", "checks/merged-nonfinite.md")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "website.build", "--site", str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


def opened(browser: Browser, address: str, complaints: list[str], size: Any = DESK, scheme: Any = "light") -> Page:
    """A tab that notes each message of the console, each error, and each request to another host."""
    page = browser.new_context(viewport=size, color_scheme=scheme).new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if not request.url.startswith(address) else None)
    return page


def problems_of(page: Page, one: SitePage, *, colors: bool = True) -> list[tuple[str, str, str]]:
    """What axe finds on an open page. The contrast of colors takes as long as all other rules."""
    page.wait_for_selector("table:not(.md-typeset__table table)", state="detached")
    options = {"resultTypes": ["violations"], "preload": False, "rules": {"color-contrast": {"enabled": colors}}}
    found = Axe().run(page, options=options).response["violations"]
    return [(one.path, kind["id"], kind["nodes"][0]["html"][:200]) for kind in found]


def shoot(page: Page, one: SitePage, name: str) -> None:
    if shots := os.environ.get("MERGE_GATE_SCREENSHOTS"):
        page.screenshot(path=Path(shots) / f"site-{one.path.replace('/', '-')}-{name}.png")


def test_every_page_is_accessible_and_fits_a_phone(browser: Browser, address: str) -> None:
    complaints: list[str] = []
    problems = []
    page = opened(browser, address, complaints)
    languages: set[str] = set()  # whose colors have been seen
    for one in site_pages():
        page.set_viewport_size(DESK)
        page.goto(f"{address}{__version__}/{one.address}")
        assert page.locator("h1").count() == 1, one.path
        new = set(re.findall(r"^ *```(\w+)", one.text, re.MULTILINE)) - languages
        problems += problems_of(page, one, colors=bool(new) or one.path in OF_EACH_KIND)
        languages |= new
        shoot(page, one, "desk-light")
        page.set_viewport_size(PHONE)
        if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
            problems.append((one.path, "wider than a phone's screen", ""))
    page.context.close()
    assert problems == []
    assert complaints == []


def test_a_page_of_each_kind_is_accessible_on_a_dark_phone(browser: Browser, address: str) -> None:
    complaints: list[str] = []
    problems = []
    page = opened(browser, address, complaints, PHONE, "dark")
    pages = [one for one in site_pages() if one.path in OF_EACH_KIND]
    assert len(pages) == len(OF_EACH_KIND)
    for one in pages:
        page.goto(f"{address}{__version__}/{one.address}")
        problems += problems_of(page, one)
        shoot(page, one, "phone-dark")
    page.context.close()
    assert problems == []
    assert complaints == []


@pytest.mark.attempt("M13", "open a page with terminals of 80 columns on a desk", "no block is cut")
def test_a_terminal_of_80_columns_is_whole_on_a_desk(browser: Browser, address: str) -> None:
    page = opened(browser, address, [])
    page.goto(f"{address}{__version__}/quickstart/")
    blocks = page.evaluate(
        "[...document.querySelectorAll('pre > code')].map(code => "
        "[Math.max(...code.textContent.split('\\n').map(line => line.length)), code.scrollWidth > code.clientWidth])"
    )
    assert max(width for width, _ in blocks if width <= 100) > 75
    assert [width for width, is_cut in blocks if is_cut and width <= 100] == []
    page.context.close()


def test_the_search_finds_a_check(browser: Browser, address: str) -> None:
    complaints: list[str] = []
    page = opened(browser, address, complaints)
    page.goto(address)
    page.wait_for_url(f"{address}{__version__}/index.html")
    page.locator(".md-search__button").click()
    page.get_by_role("combobox", name="Search").fill("merged-nonfinite")
    page.locator("a[role=option][href*='/checks/merged-nonfinite/']").first.click()
    page.wait_for_url("**/checks/merged-nonfinite/**")
    assert page.locator("h1").inner_text().strip("¶ \n") == "merged-nonfinite"
    assert complaints == []
    page.context.close()


def test_every_page_has_its_file_and_llms_txt_lists_it(site: Path) -> None:
    built = site / __version__
    listed = (built / "llms.txt").read_text(encoding="utf-8")
    for page in site_pages():
        assert (built / page.address / "index.html").is_file()
        assert f"]({page.address or './'})" in listed
