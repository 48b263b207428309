"""The explanation of each check and answer, from the package's own copies of docs/checks and docs/guides/verify.md.

In: the id of a check, or of an answer of `merge-gate verify`. Out: its page as Markdown, or as text for a terminal.
`make schemas` writes the copies.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from merge_gate.report.wording.columns import wrap

if TYPE_CHECKING:
    from collections.abc import Iterator

STORED = Path(__file__).parents[2] / "explanations.md"
STORED_KINDS = Path(__file__).parents[2] / "explained_kinds.md"
_HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
_FENCE = "```"
_LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")


@cache
def explanations() -> dict[str, str]:
    """The Markdown of each check and of each answer of `verify` by its id, without its heading."""
    return _sections(STORED) | _sections(STORED_KINDS)


def _sections(stored: Path) -> dict[str, str]:
    _, *parts = _HEADING.split(stored.read_text(encoding="utf-8"))
    return {check: text.strip() for check, text in zip(parts[::2], parts[1::2], strict=True)}


def blocks(check: str) -> Iterator[tuple[list[str], str, list[str]]]:
    """The explanation of a check in parts: the lines of an example, or a paragraph and the items of a list after it."""
    for block in re.split(r"\n\n+", explanations()[check]):
        if block.startswith(_FENCE):
            yield block.splitlines()[1:-1], "", []
        else:
            paragraph, *items = re.split(r"(?:^|\n)- ", block)
            yield [], paragraph, items


def explanation(check: str, width: int) -> str:
    """The explanation of a check as text, at most `width` columns wide except for examples."""
    lines = [check, ""]
    for example, paragraph, items in blocks(check):
        lines += [f"    {line}" for line in example]
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
