"""Text from adapters, configs and libraries, made harmless for people to read.

In: any `str`. Out: a `str` without control, bidirectional or invisible characters that no CI runner takes for a
command. Knows nothing of reports or formats; a format escapes its own syntax on top of this.
"""

from __future__ import annotations

import re
import unicodedata

from merge_gate.text import is_hidden

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"

# Beside what is hidden: characters that are nobody's, or that fonts show as they like.
_UNKNOWN_CATEGORIES = frozenset({"Co", "Cn"})
# Marks that stack on one letter beyond this many are dropped: they would climb over other lines.
_MARKS_PER_LETTER = 4

_COMMAND = re.compile(r"^(\s*):(?=:)")
_LEGACY_COMMAND = re.compile(r"#(?=#\[)")


def one_line(text: str, limit: int | None = None) -> str:
    """Return `text` on a single line, its runs of blanks collapsed, at most `limit` characters long.

    A hidden character becomes U+FFFD, so that the reader sees that something was there. A long text loses its
    middle: names differ in their heads and tails.
    """
    if text.isascii() and text.isprintable() and "  " not in text and text == text.strip(" "):  # nearly all
        line = text
    else:
        line = " ".join(_visible(part) for part in text.split())
    return shorten(line, limit) if limit else line


def shorten(text: str, limit: int) -> str:
    """Cut the middle out of `text` so that at most `limit` characters remain."""
    if len(text) <= limit:
        return text
    tail = (limit - 1) // 2
    return text[: limit - 1 - tail] + ELLIPSIS + (text[-tail:] if tail else "")


def inert(line: str) -> str:
    """Break what a GitHub runner would take for a workflow command in one line of log.

    `::name::` counts after leading blanks; the older `##[name]` counts anywhere in a line (actions/runner,
    ActionCommand.cs).
    """
    if "::" not in line and "##[" not in line:  # nearly all
        return line
    return _LEGACY_COMMAND.sub("# ", _COMMAND.sub(r"\1: ", line))


def safe_text(text: str) -> str:
    """Return foreign text of any number of lines, fit for a log: visible characters only, no line a command."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "\n".join(inert(_visible(line.replace("\t", "    "))) for line in lines)


def _visible(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    shown: list[str] = []
    marks = 0
    for character in text:
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks > _MARKS_PER_LETTER:
            continue
        hidden = is_hidden(character) or unicodedata.category(character) in _UNKNOWN_CATEGORIES
        blank = unicodedata.category(character) == "Zs"  # a no-break space and its like are blanks to a reader
        shown.append(REPLACEMENT if hidden else " " if blank else character)
    return "".join(shown)
