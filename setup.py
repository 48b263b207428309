"""What pyproject.toml cannot express: the package's description and links, which depend on the project's address.

In: README.md, the address in `records/project.py`, and the version. Out: metadata. On a package index, relative links
lead nowhere, so they become links to the repository once it has an address.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
LINK = re.compile(r'(\]\(|src(?:set)?=")(?![a-z]+:|#)([^)"\s]+)')


def absolute(readme: str, address: str, version: str) -> str:
    """Return the README with absolute links to files of this version, or unchanged while there is no address."""
    if not address:
        return readme
    commit = f"v{version}" if re.fullmatch(r"[\d.]+", version) else "HEAD"
    return LINK.sub(
        lambda link: f"{link[1]}{address}/{'raw' if 'src' in link[1] else 'blob'}/{commit}/{link[2]}", readme
    )


def links(address: str, documentation: str | None) -> dict[str, str]:
    """Return the links that package indexes show next to the description."""
    if not address:
        return {}
    shown = {"Repository": address, "Issues": f"{address}/issues", "Changelog": f"{address}/blob/HEAD/CHANGELOG.md"}
    return shown | ({"Documentation": documentation} if documentation else {})


if __name__ == "__main__":
    source = (ROOT / "src" / "merge_gate" / "__init__.py").read_text(encoding="utf-8")
    version = re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE)[0]
    project = runpy.run_path(str(ROOT / "src" / "merge_gate" / "records" / "project.py"))
    setup(
        long_description=absolute((ROOT / "README.md").read_text(encoding="utf-8"), project["PROJECT_URL"], version),
        long_description_content_type="text/markdown",
        project_urls=links(project["PROJECT_URL"], project["documentation_url"](version)),
    )
