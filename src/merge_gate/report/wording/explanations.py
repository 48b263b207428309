"""The explanation of each check, and of each kind of finding that is no check.

In: the id of a check or a kind. Out: its page as Markdown or as text for a terminal, and the page's address. A check's
page is the docstring of its module. The pages of kinds are copies of docs/checks and of docs/guides/verify.md and
verify-quantized.md, with the hints of the kinds. `make schemas` writes them.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from merge_gate import __version__
from merge_gate._internal.text import wrapped
from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.kinds import ANSWERS
from merge_gate.records.project import check_url, documentation_url, kind_url
from merge_gate.records.report import AdapterReport, BaseReport

if TYPE_CHECKING:
    from collections.abc import Iterator

_Judged = TypeVar("_Judged", AdapterReport, BaseReport)
STORED_KINDS = Path(__file__).parents[2] / "explained_kinds.md"
_HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
_FENCE = "```"
_LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")
_LINK_TO_PAGE = re.compile(r"\[([^\]]+)\]\((?!https://)([^)\s#]*)(#[^)\s]*)?\)")


@cache
def explanations() -> dict[str, str]:
    """The Markdown of each check and kind by its id, without its heading.

    A link to another page has the page's address. While the project has none, it is text that names the file.
    """
    _, *parts = _HEADING.split(STORED_KINDS.read_text(encoding="utf-8"))
    pages = {check: row.explanation for check, row in CHECKS.items()} | dict(zip(parts[::2], parts[1::2], strict=True))
    return {check: _LINK_TO_PAGE.sub(_link_to_page, page.strip()) for check, page in pages.items()}


def _link_to_page(match: re.Match[str]) -> str:
    text, page, anchor = match[1], match[2].removesuffix(".md"), match[3] or ""
    if not page or page in CHECKS:  # a part of the same page; `merge-gate explain` has the other one
        return text if not page or not (address := check_url(page, __version__)) else f"[{text}]({address}{anchor})"
    page = page.removeprefix("../")
    documentation = documentation_url(__version__)
    return f"[{text}]({documentation}{page}/{anchor})" if documentation else f"{text} (docs/{page}.md)"


def blocks(check: str) -> Iterator[tuple[list[str], str, list[str]]]:
    """The explanation of a check in parts: the lines of an example, or a paragraph and the items of a list after it."""
    for block in re.split(r"\n\n+", explanations()[check]):
        if block.startswith(_FENCE):
            yield block.splitlines()[1:-1], "", []
        else:
            paragraph, *items = re.split(r"(?:^|\n)- ", block)
            yield [], paragraph, items


def explanation(check: str, width: int) -> str:
    """The explanation of a check as text, at most `width` columns wide except for examples and addresses."""
    lines = [check, ""]
    for example, paragraph, items in blocks(check):
        lines += [f"    {line}" for line in example]
        lines += wrapped(_plain(paragraph), width)
        lines += [line for item in items for line in wrapped(_plain(item), width, "- ", "  ")]
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def _plain(text: str) -> str:
    """Markdown without its marks. The address of a link follows its text."""
    return _LINK.sub(r"\1 (\2)", text).replace("**", "")


def page_of(check: str) -> str | None:
    """The address of the page on a check or a kind. None if it has none, or while the project has no address."""
    if check in ANSWERS:
        return kind_url(check, __version__, ANSWERS[check].page)
    return check_url(check, __version__) if check in explanations() else None


def linked(report: _Judged) -> _Judged:
    """The report with the address of each finding's check. All reports of a run pass here."""
    return replace(report, findings=tuple(replace(finding, url=page_of(finding.check)) for finding in report.findings))
