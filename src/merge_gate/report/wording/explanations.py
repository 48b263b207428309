"""The explanation of each check and answer, from the package's own copies of docs/checks and docs/guides/verify.md.

In: the id of a check, or of an answer of `merge-gate verify`. Out: its page as Markdown, or as text for a terminal.
`make schemas` writes the copies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from merge_gate.report.wording.columns import wrap

STORED = Path(__file__).parents[2] / "explanations.md"
STORED_KINDS = Path(__file__).parents[2] / "explained_kinds.md"
_HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_FENCE = "```"
_LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")


@cache
def explanations() -> dict[str, str]:
    """The Markdown of each check and of each answer of `verify` by its id, without its heading."""
    return _sections(STORED) | _sections(STORED_KINDS)


def _sections(stored: Path) -> dict[str, str]:
    _, *parts = _HEADING.split(stored.read_text(encoding="utf-8"))
    return {check: text.strip() for check, text in zip(parts[::2], parts[1::2], strict=True)}


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


def explanation(check: str, width: int) -> str:
    """The explanation of a check as text, at most `width` columns wide except for examples."""
    lines = [check, ""]
    for block in re.split(r"\n\n+", explanations()[check]):
        if block.startswith(_FENCE):
            lines += [f"    {line}" for line in block.splitlines()[1:-1]]
        else:
            paragraph, *items = re.split(r"(?:^|\n)- ", block)
            lines += wrap(_plain(paragraph), width) if paragraph else []
            lines += [line for item in items for line in _item(_plain(item), width)]
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def _item(text: str, width: int) -> list[str]:
    first, *rest = wrap(text, width - 2)
    return [f"- {first}", *(f"  {line}" for line in rest)]


def _plain(text: str) -> str:
    """Markdown without its marks. The address of a link follows its text."""
    return _LINK.sub(r"\1 (\2)", text).replace("**", "")
