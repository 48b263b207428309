"""`make pictures` runs, and its pictures are what the documents need: small, sharp, by day and by night."""

from pathlib import Path

import pytest
from PIL import Image

from tests.support.terminal_picture import text_of
from tests.tools.pictures import IMAGES, make

pytestmark = pytest.mark.e2e

MOST_BYTES = 200_000


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pictures")
    make(directory)
    return directory


def test_all_pictures_are_made(pictures: Path) -> None:
    assert {path.name for path in pictures.iterdir()} == {path.name for path in IMAGES.iterdir()}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_is_shown_in_both_schemes(pictures: Path, scheme: str) -> None:
    for directory in (pictures, IMAGES):
        path = directory / f"report-{scheme}.png"
        assert path.stat().st_size < MOST_BYTES
        with Image.open(path) as image:
            assert image.width > 1000
            assert 0.5 < image.height / image.width < 1.2, "the head of the page, and one adapter"
            least, most = image.convert("L").getpixel((2, 2)), 255
            assert (least > most / 2) is (scheme == "light")


def test_the_terminal_is_drawn(pictures: Path) -> None:
    assert text_of((pictures / "demo.svg").read_text(encoding="utf-8")).startswith("$merge-gatedemo")
