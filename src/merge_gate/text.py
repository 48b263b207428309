"""Foreign text and lists of names, as they stand in a sentence.

In: any `str`. Out: a `str` for a message, or whether a reader would see all of it. Knows nothing of what the text is
about. Standard library only, and any Python from 3.9 on: the action's own Python imports it too.
"""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

# Control, format (bidi overrides, zero width), surrogate, line and paragraph separators.
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
# Letters that show as nothing: Hangul fillers, and the blank braille cell.
_BLANK_LETTERS = frozenset("\u115f\u1160\u3164\uffa0\u2800")


def is_hidden(character: str) -> bool:
    """Whether a reader sees nothing of this character, or sees others in another order because of it."""
    return unicodedata.category(character) in _HIDDEN_CATEGORIES or character in _BLANK_LETTERS


def has_hidden(text: str) -> bool:
    """Whether any character of `text` is hidden; tabs and line breaks are."""
    return not (text.isascii() and text.isprintable()) and any(map(is_hidden, text))


def quoted(text: str, most: int = 60, mark: str = '"') -> str:
    """`text` between two `mark`s, cut to `most` characters, with all that is hidden or unprintable escaped."""
    shown = text if len(text) <= most else f"{text[: most - 1]}…"
    if shown.isprintable() and not has_hidden(shown):
        return f"{mark}{shown}{mark}"
    escaped = (c if c.isprintable() and not is_hidden(c) else c.encode("unicode_escape").decode() for c in shown)
    return f"{mark}{''.join(escaped)}{mark}"


def listing(names: Iterable[str], most: int = 5) -> str:
    """`a, b, c and 4 more`."""
    known = list(names)
    shown = ", ".join(known[:most])
    return f"{shown} and {len(known) - most:,} more" if len(known) > most else shown


def counted(count: int, one: str, many: str = "") -> str:
    """(1, "adapter") → 1 adapter, (2, "adapter") → 2 adapters; `many` where that is not `one` and an s."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def one_of(words: Iterable[str]) -> str:
    """`a, b or c`."""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else str(last)
