"""The documentation's site: its navigation, its links, and its lists. tests/e2e/test_site.py builds and opens it."""

import posixpath
from pathlib import Path
from typing import Any

import pytest

from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.kinds import WITHOUT_SETTING
from website.build import (
    ROOT,
    SitePage,
    in_order,
    llms,
    llms_full,
    navigation,
    newest_first,
    site_pages,
    staged_text,
    write_versions,
)

PAGES = site_pages()
ADDRESS = "https://github.com/acme/merge-gate"
GUIDE = ROOT / "docs" / "guides" / "fleets.md"


def entries(nav: list[dict[str, Any]]) -> list[str]:
    """The paths in a navigation, in its order."""
    found = []
    for entry in nav:
        for value in entry.values():
            inner = value if isinstance(value, list) else [value]
            found += [one if isinstance(one, str) else next(iter(one.values())) for one in inner]
    return found


def test_every_page_is_in_the_navigation_once() -> None:
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    in_nav = entries(navigation(PAGES))
    assert len(in_nav) == len(set(in_nav))
    assert set(in_nav) == written | {"project/changelog.md", "project/contributing.md", "project/security-policy.md"}


def test_the_navigation_is_sorted_by_reader_and_blame() -> None:
    sections = [next(iter(entry)) for entry in navigation(PAGES)]
    assert sections[0] == "Home"
    assert sections[-6:] == ["Guides", "Reference", "Checks", "Concepts", "Evidence", "Project"]
    checks = [page for page in entries(navigation(PAGES)) if page.startswith("checks/")]
    assert checks == [f"checks/{name}.md" for name in ("index", *CHECKS, *WITHOUT_SETTING)]


def test_other_pages_follow_and_other_folders_are_errors() -> None:
    ordered = in_order(["guides/zebra.md", "index.md", "guides/trainers.md"])
    assert ordered[-2:] == ["guides/trainers.md", "guides/zebra.md"]
    with pytest.raises(SystemExit, match="recipes"):
        in_order(["recipes/one.md"])


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[a](../checks/index.md#x)", "[a](../checks/index.md#x)"),
        ("[a](../../CHANGELOG.md)", "[a](../project/changelog.md)"),
        ("[a](../../README.md#install)", "[a](../index.md)"),
        ("[a](../../Makefile)", "[a](../files/Makefile.txt)"),
        ("[`a`](../../pyproject.toml)", "[`a`](../files/pyproject.toml)"),
        ("[a](../../recipes)", "a"),
        ("[a](../../recipes)", f"[a]({ADDRESS}/tree/main/recipes)"),
        ("[a](https://example.com/b)", "[a](https://example.com/b)"),
        ("`[a](../../Makefile)`", "`[a](../../Makefile)`"),
        ("[a](nowhere.md)", "[a](nowhere.md)"),
    ],
)
def test_a_link_of_a_page_leads_to_a_page_or_a_copy(link: str, expected: str) -> None:
    """A folder has neither: with an address, its link leads to the repository."""
    address = "" if expected == "a" else ADDRESS
    files: set[Path] = set()
    page = SitePage("guides/fleets.md", GUIDE, link)
    assert staged_text(page, {page.source: page.path for page in PAGES}, files, address) == expected
    assert len(files) == ("files/" in expected)


def test_llms_txt_lists_every_page() -> None:
    text = llms(PAGES)
    for page in PAGES:
        assert f"- [{page.title}](" in text
        assert page.title != page.path
        assert page.summary, f"{page.path} begins without a sentence"
    assert all(page.title in llms_full(PAGES) for page in PAGES if "`" not in page.title)


def test_the_newest_version_comes_first() -> None:
    versions = ["1.9.0", "1.10.0.dev0", "1.10.0", "0.1.0"]
    assert newest_first(versions) == ["1.10.0", "1.10.0.dev0", "1.9.0", "0.1.0"]


def test_a_version_is_added_to_the_earlier_ones(tmp_path: Path) -> None:
    for version in ("1.0.0", "1.1.0"):
        (tmp_path / version).mkdir()
    write_versions(tmp_path)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.index("1.1.0/index.html") < page.index("1.0.0/index.html")
    assert (tmp_path / "versions.json").read_text(encoding="utf-8") == '["1.1.0", "1.0.0"]\n'


def test_the_site_loads_nothing_from_elsewhere() -> None:
    for name in ("zensical.toml", "extra.css", "extra.js", "versions.html"):
        text = (ROOT / "website" / name).read_text(encoding="utf-8")
        assert "//" not in "".join(line for line in text.splitlines() if not line.strip().startswith(("//", "#")))


def test_addresses_follow_the_folders() -> None:
    pages = {page.path: page.address for page in PAGES}
    assert pages["index.md"] == ""
    assert pages["checks/index.md"] == "checks/"
    assert pages["checks/no-effect.md"] == "checks/no-effect/"
    assert all(posixpath.normpath(address or ".") for address in pages.values())
