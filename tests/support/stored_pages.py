"""What the package stores of the pages that `merge-gate explain` prints."""

from __future__ import annotations

import re
from collections.abc import Mapping

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")


def to_store(pages: Mapping[str, str]) -> str:
    """What the package stores of docs/checks: a section for each page, without comments and links to other pages.

    Args:
        pages: the Markdown of each page by its check, in the order of blame.
    """
    bodies = {check: _COMMENT.sub("", page).partition("\n")[2].strip() for check, page in pages.items()}
    sections = "\n\n".join(f"## {check}\n\n{body}" for check, body in bodies.items()) + "\n"
    return _LINK.sub(lambda link: link[0] if link[2].startswith("https://") else link[1], sections)


def kinds_to_store(page: str) -> str:
    """What the package stores of docs/guides/verify.md: the sections on each kind."""
    sections = re.findall(r"^### (\S+)\n\n(.*?)(?=^##)", page, re.MULTILINE | re.DOTALL)
    return "\n\n".join(f"## {kind}\n\n{text.strip()}" for kind, text in sections) + "\n"
