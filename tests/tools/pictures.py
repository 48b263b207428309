"""Make the pictures of the README and the documents: `make pictures`, or with another directory:

    python -m tests.tools.pictures --output DIRECTORY

`merge-gate demo` runs for real. Debian's Chromium photographs its report.html by day and by night, with the adapter
`overflow` opened in float16, and rich draws what it printed.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from tests.support.command import merge_gate
from tests.support.e2e.browser import chromium
from tests.support.terminal_picture import drawn_demo

if TYPE_CHECKING:
    from playwright.sync_api import Page

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
WIDTH, SCALE, COLORS = 920, 1.5, 256
"""CSS pixels, pixels of the picture for each of them, and how many colors its palette has."""
MARGIN = 8


def make(directory: Path) -> None:
    """Write report-light.png, report-dark.png and demo.svg."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        answer = merge_gate("demo", "--color", "always", cwd=Path(place))
        assert answer.code == 0, answer.said
        (directory / "demo.svg").write_text(drawn_demo(answer.out), encoding="utf-8")
        report = Path(place) / "merge-gate-demo" / "merge-gate-report" / "report.html"
        with chromium() as browser:
            for scheme in ("light", "dark"):
                page = browser.new_page(
                    viewport={"width": WIDTH, "height": 900}, color_scheme=scheme, device_scale_factor=SCALE
                )
                page.goto(report.as_uri())
                (directory / f"report-{scheme}.png").write_bytes(small(photograph(page)))


def photograph(page: Page) -> bytes:
    """The head of the page, and `overflow` opened with its map."""
    page.locator("#adapter-nan .open").click()
    overflow = page.locator("#adapter-overflow")
    overflow.locator(".open").click()
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    lowest = overflow.locator(".map .legend").first.bounding_box()
    assert lowest
    height = lowest["y"] + lowest["height"] + MARGIN
    return page.screenshot(clip={"x": 0, "y": 0, "width": WIDTH, "height": height}, full_page=True)


def small(png: bytes) -> bytes:
    """The same picture with a palette."""
    written = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(
        written, "PNG", optimize=True
    )
    return written.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=IMAGES, metavar="DIRECTORY")
    make(parser.parse_args().output)
