"""The documentation's site in a real browser, from a local server: every page, light on a desk and dark on a phone.

Screenshots are left in $MERGE_GATE_SCREENSHOTS if that names a directory.
"""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

from merge_gate import __version__
from website.build import ROOT, site_pages

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.e2e

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 900}


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
    chromium = shutil.which("chromium")
    assert chromium, "no chromium: run .ci/install-e2e.sh first"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        yield browser
        browser.close()


def opened(browser: Browser, address: str, complaints: list[str], size: Any = DESK, scheme: Any = "light") -> Page:
    """A tab that notes each message of the console, each error, and each request to another host."""
    page = browser.new_context(viewport=size, color_scheme=scheme).new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if not request.url.startswith(address) else None)
    return page


@pytest.mark.parametrize(("size", "scheme"), [(DESK, "light"), (PHONE, "dark")], ids=["desk-light", "phone-dark"])
def test_every_page_is_accessible_and_fits(browser: Browser, address: str, size: Any, scheme: str) -> None:
    complaints: list[str] = []
    problems = []
    page = opened(browser, address, complaints, size, scheme)
    shots = os.environ.get("MERGE_GATE_SCREENSHOTS")
    for one in site_pages():
        page.goto(f"{address}{__version__}/{one.address}")
        page.wait_for_selector("table:not(.md-typeset__table table)", state="detached")
        assert page.locator("h1").count() == 1, one.path
        found = Axe().run(page).response["violations"]
        problems += [(one.path, kind["id"], kind["nodes"][0]["html"][:200]) for kind in found]
        wide = page.evaluate("document.documentElement.scrollWidth > innerWidth")
        problems += [(one.path, "wider than the screen", "")] if wide else []
        if shots:
            page.screenshot(path=Path(shots) / f"site-{one.path.replace('/', '-')}-{size['width']}-{scheme}.png")
    page.context.close()
    assert problems == []
    assert complaints == []


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
