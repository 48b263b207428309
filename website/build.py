"""Builds the documentation's site from docs/ into site/VERSION/, with a page that leads to the newest version.

In: the pages of docs/, and CHANGELOG.md, CONTRIBUTING.md, and SECURITY.md. Out: a static site that loads nothing from
elsewhere. A broken link or anchor fails the build. `make docs` runs it.

1. Stage: copy the pages, point links that leave docs/ at copies of their files, and write llms.txt and llms-full.txt.
2. Navigate: one section for each folder, with its pages in order.
3. Build: Zensical, strict.
4. Index: the page of all versions.
"""

from __future__ import annotations

import argparse
import html
import json
import posixpath
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from packaging.version import Version

from merge_gate import __version__
from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.kinds import WITHOUT_SETTING
from merge_gate.records.project import PROJECT_URL, documentation_url

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DOCS = ROOT / "docs"

ORDER: Mapping[str, tuple[str, ...]] = {
    "": ("index", "quickstart", "installation"),
    "guides": ("which-command", "trainers", "github-actions", "other-ci", "clusters", "troubleshooting"),
    "reference": ("command-line", "action", "configuration", "report", "exit-codes", "environment"),
    "checks": ("index", *CHECKS, *WITHOUT_SETTING),
    "concepts": ("how-it-works", "forward", "limits"),
    "evidence": ("truth",),
    "project": ("support", "changelog", "contributing", "security-policy"),
}
"""The folders of docs/ in the order of the navigation, and what comes first in each. Other pages follow by name."""

FROM_ROOT = {
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security-policy.md",
}
"""The pages that are made from documents at the repository's root."""

_FENCE = re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_CODE_OR_LINK = re.compile(
    rf"{_FENCE.pattern}|`[^`]*`|(?P<text>!?\[(?:[^\]`]|`[^`]*`)*\])\((?P<target>[^)\s]+)\)", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class SitePage:
    """A page: its path below docs/, the document that it is made from, and its Markdown."""

    path: str
    source: Path
    text: str

    @property
    def title(self) -> str:
        return re.findall(r"^# (.+)$", _FENCE.sub("", self.text), re.MULTILINE)[0].replace("`", "")

    @property
    def summary(self) -> str:
        """The first sentence of the first paragraph, without marks."""
        prose = _COMMENT.sub("", _FENCE.sub("", self.text))
        paragraphs = [block.strip() for block in re.split(r"\n\s*\n", prose) if re.match(r"\s*[\w*`\[]", block)]
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[*`]", r"\1", " ".join("".join(paragraphs[:1]).split()))
        return re.split(r"(?<=[.:;])\s", plain, maxsplit=1)[0].rstrip(":;")

    @property
    def address(self) -> str:
        """The address of its HTML within the site: `checks/no-effect/`; empty for the front page."""
        return re.sub(r"(^|/)index/$", r"\1", self.path.removesuffix(".md") + "/")


def site_pages() -> list[SitePage]:
    """Every page in the order of the navigation.

    Raises:
        SystemExit: a page is in a folder that the navigation does not have.
    """
    sources = {path.relative_to(DOCS).as_posix(): path for path in DOCS.rglob("*.md")}
    sources |= {path: ROOT / name for name, path in FROM_ROOT.items()}
    return [SitePage(path, sources[path], sources[path].read_text(encoding="utf-8")) for path in in_order(sources)]


def in_order(paths: Iterable[str]) -> list[str]:
    """The paths of pages in the order of the navigation."""
    folders = list(ORDER)

    def rank(path: str) -> tuple[int, int, str]:
        folder, name = posixpath.split(path.removesuffix(".md"))
        if folder not in folders:
            raise SystemExit(
                f"docs/{path}: the navigation has no folder {folder!r}; ORDER in website/build.py lists them"
            )
        first = ORDER[folder]
        return folders.index(folder), first.index(name) if name in first else len(first), name

    return sorted(paths, key=rank)


def navigation(pages: Iterable[SitePage]) -> list[dict[str, Any]]:
    """The entries of the navigation: pages at the top, then a section for each folder."""
    entries: list[dict[str, Any]] = []
    for page in pages:
        folder = posixpath.dirname(page.path)
        title = "Home" if page.path == "index.md" else page.title
        if not folder:
            entries.append({title: page.path})
            continue
        section = folder.capitalize()
        if section not in entries[-1]:
            entries.append({section: []})
        entries[-1][section].append(page.path if page.path.endswith("/index.md") else {title: page.path})
    return entries


def staged_text(page: SitePage, by_source: Mapping[Path, str], files: set[Path], address: str = PROJECT_URL) -> str:
    """The Markdown of a page whose links lead to pages and files of the site.

    A link to a document becomes a link to its page, and one to the README leads to the front page. A link to another
    file of the repository leads to a copy, which `files` receives. A folder has no copy: the link leads to the
    repository, or is only its text without an address.
    """

    def moved(match: re.Match[str]) -> str:
        target = match["target"]
        if target is None or re.match(r"[a-z]+:|#", target):
            return match[0]
        name, _, anchor = target.partition("#")
        path = (page.source.parent / name).resolve()
        if not path.exists():
            return match[0]  # Zensical reports it
        if path == ROOT / "README.md":
            goal, anchor = "index.md", ""
        elif path in by_source:
            goal = by_source[path]
        elif path.is_dir():
            text = match["text"][1:-1]
            return f"[{text}]({address}/tree/main/{path.relative_to(ROOT)})" if address else text
        else:
            files.add(path)
            goal = path.relative_to(DOCS).as_posix() if path.is_relative_to(DOCS) else _copy_of(path)
        relative = posixpath.relpath(goal, posixpath.dirname(page.path) or ".")
        return f"{match['text']}({relative}{'#' if anchor else ''}{anchor})"

    return _CODE_OR_LINK.sub(moved, page.text)


def _copy_of(path: Path) -> str:
    """The place in the site of a file of the repository, whose name must not make it a page."""
    name = path.relative_to(ROOT).as_posix()
    return f"files/{name}.txt" if path.suffix in {"", ".md", ".py", ".yml"} else f"files/{name}"


def stage(pages: list[SitePage], directory: Path) -> None:
    """Steps 1 and 2: everything that Zensical reads."""
    files: set[Path] = set()
    by_source = {page.source: page.path for page in pages}
    for page in pages:
        path = directory / "docs" / page.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(staged_text(page, by_source, files), encoding="utf-8")
    for file in files | {path for path in DOCS.rglob("*") if path.is_file() and path.suffix != ".md"}:
        goal = file.relative_to(DOCS).as_posix() if file.is_relative_to(DOCS) else _copy_of(file)
        path = directory / "docs" / goal
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, path)
    (directory / "docs" / "llms.txt").write_text(llms(pages), encoding="utf-8")
    (directory / "docs" / "llms-full.txt").write_text(llms_full(pages), encoding="utf-8")
    assets = directory / "docs" / "assets"
    assets.mkdir()
    for name in ("extra.css", "extra.js"):
        shutil.copyfile(HERE / name, assets / name)
    with (HERE / "zensical.toml").open("rb") as file_of_settings:
        settings = tomllib.load(file_of_settings)["project"]
    settings |= {"nav": navigation(pages), "extra": {"version_name": __version__}}
    if address := documentation_url(__version__):
        settings |= {"site_url": address, "repo_url": PROJECT_URL}
    (directory / "mkdocs.yml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def accessible(page: str) -> str:
    """The HTML of a page: landmarks have names of their own, and the empty corner of a table is no heading."""
    page = page.replace('<nav class="md-path" aria-label="Navigation"', '<nav class="md-path" aria-label="Breadcrumb"')
    page = re.sub(r'aria-labelledby="(__nav_\d+)_label"', r'aria-labelledby="\1_title"', page)
    page = re.sub(r'<label class="md-nav__title" for="(__nav_\d+)"', r'\g<0> id="\1_title"', page)
    return page.replace("<th></th>", "<td></td>")


def llms(pages: list[SitePage]) -> str:
    """The content of llms.txt: each page with its address and first sentence, by section (llmstxt.org)."""
    base = documentation_url(__version__) or ""
    lines = [f"# merge-gate {__version__}", "", f"> {pages[0].summary}", ""]
    section = ""
    for page in pages:
        folder = posixpath.dirname(page.path)
        if folder != section:
            section = folder
            lines += ["", f"## {section.capitalize()}", ""]
        lines.append(f"- [{page.title}]({base}{page.address or './'}): {page.summary}")
    return "\n".join(lines) + "\n"


def llms_full(pages: list[SitePage]) -> str:
    """The content of llms-full.txt: the Markdown of every page."""
    return "\n\n".join(_COMMENT.sub("", page.text).strip() for page in pages) + "\n"


def newest_first(versions: Iterable[str]) -> list[str]:
    """Versions in the order of packages (PEP 440), the newest first."""
    return sorted(versions, key=Version, reverse=True)


def write_versions(site: Path) -> None:
    """The page that leads to the newest version and lists all of them."""
    versions = newest_first(path.name for path in site.iterdir() if path.is_dir())
    (site / "versions.json").write_text(json.dumps(versions) + "\n", encoding="utf-8")
    links = "".join(f'<li><a href="{html.escape(name)}/index.html">{html.escape(name)}</a></li>' for name in versions)
    page = (HERE / "versions.html").read_text(encoding="utf-8")
    page = page.replace("NEWEST", html.escape(versions[0])).replace("LINKS", links)
    (site / "index.html").write_text(page, encoding="utf-8")


def build(site: Path) -> Path:
    """Build the site of this version; return its directory.

    Raises:
        SystemExit: Zensical found a broken link or anchor, which it has printed.
    """
    work = ROOT / "build" / "website"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    pages = site_pages()
    stage(pages, work)
    zensical = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", "mkdocs.yml"]
    if subprocess.run(zensical, cwd=work, check=False).returncode:
        raise SystemExit("the documentation has problems: see above")
    built = work / "site"
    for page in built.rglob("*.html"):
        page.write_text(accessible(page.read_text(encoding="utf-8")), encoding="utf-8")
    goal = site / __version__
    shutil.rmtree(goal, ignore_errors=True)
    goal.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(built, goal)
    write_versions(site)
    return goal


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the documentation's site.")
    parser.add_argument("--site", type=Path, default=ROOT / "site", help="directory of all versions (default: site)")
    print(f"open {build(parser.parse_args().site) / 'index.html'}")


if __name__ == "__main__":
    main()
