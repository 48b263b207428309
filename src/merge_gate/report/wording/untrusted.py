"""Makes text from adapters, configs, and libraries harmless.

The result has no control, bidirectional, or invisible characters, and no CI runner reads it as a command. Each format
escapes its own syntax as well.
"""

from __future__ import annotations

import re
import unicodedata

from merge_gate._internal.text import is_hidden, without_credentials

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"

# Unassigned and private-use characters, which fonts may show in any way.
_UNKNOWN_CATEGORIES = frozenset({"Co", "Cn"})
# More combining marks than this on one letter are dropped: they would cover other lines.
_MARKS_PER_LETTER = 4

_COMMAND = re.compile(r"^(\s*):(?=:)")
_LEGACY_COMMAND = re.compile(r"#(?=#\[)")


def one_line(text: str, length: int | None = None) -> str:
    """Return `text` on a single line with single spaces, at most `length` characters long.

    A hidden character becomes U+FFFD, so that the reader can see it. A long text loses its middle, since names differ
    at their starts and ends. URLs lose their credentials.
    """
    text = without_credentials(text)
    if text.isascii() and text.isprintable() and "  " not in text and text == text.strip(" "):  # nearly all
        line = text
    else:
        line = " ".join(_visible(part) for part in text.split())
    return shorten(line, length) if length else line


def shorten(text: str, length: int) -> str:
    """Cut the middle out of `text` so that at most `length` characters remain."""
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return text[: length - 1 - tail] + ELLIPSIS + (text[-tail:] if tail else "")


def shorten_between_words(text: str, length: int) -> str:
    """Cut whole words out of the middle of `text`, so that each name that remains is whole. A long word is cut."""
    if len(text) <= length:
        return text
    tail = (length - 2 - len(ELLIPSIS)) // 2
    head, end = text[: length - 2 - len(ELLIPSIS) - tail], text[-tail:]
    first, last = head.rpartition(" ")[0], end.partition(" ")[2]
    return f"{first} {ELLIPSIS} {last}" if first and last else shorten(text, length)


def inert(line: str) -> str:
    """Alter text that a GitHub runner would read as a workflow command, in one line of log.

    `::name::` counts after leading blanks; the older `##[name]` counts anywhere in a line (actions/runner,
    ActionCommand.cs).
    """
    if "::" not in line and "##[" not in line:  # nearly all
        return line
    return _LEGACY_COMMAND.sub("# ", _COMMAND.sub(r"\1: ", line))


def safe_text(text: str) -> str:
    """Return foreign text of several lines for a log: with visible characters only, and no line a command.

    URLs lose their credentials.
    """
    lines = without_credentials(text).replace("\r\n", "\n").replace("\r", "\n").split("\n")
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
        blank = unicodedata.category(character) == "Zs"  # a no-break space looks like a space
        shown.append(REPLACEMENT if hidden else " " if blank else character)
    return "".join(shown)
