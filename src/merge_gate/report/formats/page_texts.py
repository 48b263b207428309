"""Texts of report.html that are not in the report: the meaning of a check, and the command that repeats an adapter.

In: ids of checks, or the entries of an adapter. Out: HTML without foreign text, or a command for a shell.
"""

from __future__ import annotations

import re
import shlex
from functools import cache
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from merge_gate.records.config import COMMAND_LINE
from merge_gate.report.wording.explanations import explanations
from merge_gate.report.wording.untrusted import one_line
from merge_gate.text import has_hidden

if TYPE_CHECKING:
    from collections.abc import Iterable

    from merge_gate.records.report import AdapterReport

MAX_LENGTH = 2000
"""Characters of a text of the page. The middle of a longer one is left out."""

_LINK = re.compile(r"\[([^\]]+)\]\([^)\s]+\)")
_BOLD = re.compile(r"\*\*([^*]+)\*\*")
_CODE = re.compile(r"`([^`]+)`")


def meanings(checks: Iterable[str]) -> list[tuple[str, Markup]]:
    """The explanation of each check that has one, as HTML."""
    return [(check, _meaning(check)) for check in checks if check in explanations()]


@cache
def _meaning(check: str) -> Markup:
    blocks = re.split(r"\n\n+", explanations()[check])
    return Markup("\n").join(_block(block) for block in blocks)


def _block(block: str) -> Markup:
    if block.startswith("```"):
        return Markup("<pre>{}</pre>").format("\n".join(block.splitlines()[1:-1]))
    paragraph, *items = re.split(r"(?:^|\n)- ", block)
    listed = Markup("").join(Markup("<li>{}</li>").format(_inline(item)) for item in items)
    return (Markup("<p>{}</p>").format(_inline(paragraph)) if paragraph else Markup("")) + (
        Markup("<ul>{}</ul>").format(listed) if items else Markup("")
    )


def _inline(text: str) -> Markup:
    """The page leads nowhere, so a link is only its text."""
    html = str(escape(_LINK.sub(r"\1", " ".join(text.split()))))
    html = _BOLD.sub(r"<b>\1</b>", _CODE.sub(r"<code>\1</code>", html))
    return Markup(html)  # noqa: S704 - text of this package, and escaped


def repeat_command(entries: tuple[AdapterReport, ...], config_path: str) -> str:
    """The command that gates one adapter again, or a shell's comment if a name cannot be typed.

    Empty for a model that was compared, which has no `config_path`.
    """
    first = entries[0]
    if not config_path:
        return ""
    if config_path != COMMAND_LINE:
        words = ["merge-gate", "run", config_path, "--only", first.name]
    else:
        words = ["merge-gate", "run", first.source, *(["--base", first.base.model] if first.base.model else [])]
        words += ["--dtype", ",".join(dict.fromkeys(entry.base.dtype for entry in entries))]
    command = shlex.join(words)
    is_shown_whole = command == one_line(command, MAX_LENGTH)  # a cut could move the end of a quotation
    is_option = any(word.startswith("-") for word in (words[2], first.name, first.base.model or ""))
    can_be_typed = is_shown_whole and not is_option and not any(map(has_hidden, words))
    return command if can_be_typed else "# a name has characters that cannot be typed"
