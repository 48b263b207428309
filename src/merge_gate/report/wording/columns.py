"""Text in the columns of a terminal: how wide it is, cut to a width, broken into lines.

In: text on one line and a width in columns. Out: text. Knows nothing of reports or of escape codes. How wide a
character is, rich knows; it is imported for text beyond ASCII only, so that a log in a job does without it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from merge_gate.report.wording.untrusted import ELLIPSIS

if TYPE_CHECKING:
    from collections.abc import Callable

_BREAK_AFTER = re.compile(r"[./\\_:,=-]")


def cells(text: str) -> int:
    """Columns that `text` takes: East Asian wide characters take two, combining ones none."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # noqa: PLC0415 - see above

    return cell_len(text)


def cut(text: str, width: int) -> str:
    """Cut the middle out of `text` so that it takes at most `width` columns."""
    if cells(text) <= width:
        return text
    tail = (width - 1) // 2
    return _head(text, width - 1 - tail) + ELLIPSIS + _tail(text, tail)


def cut_front(text: str, width: int) -> str:
    """Cut the beginning off `text` so that it takes at most `width` columns."""
    return text if cells(text) <= width else ELLIPSIS + _tail(text, width - 1)


def pad(text: str, width: int) -> str:
    """Return `text`, cut or filled with blanks to exactly `width` columns."""
    shown = cut(text, width)
    return shown + " " * (width - cells(shown))


def wrap(text: str, width: int) -> list[str]:
    """Break `text` at blanks, and names that are too long after a dot, a slash or the like."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if cells(joined) <= width:
            line = joined
            continue
        if line:
            lines.append(line)
        *full, line = _pieces(word, width)
        lines += full
    return [*lines, line]


def fit(widths: list[int], available: int) -> list[int]:
    """Narrow the widest columns until their sum is `available`, or each is one column wide."""
    widths = list(widths)
    while sum(widths) > max(available, len(widths)):
        widths[widths.index(max(widths))] -= 1
    return widths


def _pieces(word: str, width: int) -> list[str]:
    pieces = []
    while cells(word) > width:
        head = _head(word, width) or word[0]
        breaks = [match.end() for match in _BREAK_AFTER.finditer(head)]
        if breaks and breaks[-1] > len(head) // 2:
            head = head[: breaks[-1]]
        pieces.append(head)
        word = word[len(head) :]
    return [*pieces, word]


def _head(text: str, width: int) -> str:
    """The longest beginning that fits."""
    return text[: _longest(text, width, lambda length: text[:length])]


def _tail(text: str, width: int) -> str:
    """The longest end that fits."""
    length = _longest(text, width, lambda length: text[len(text) - length :])
    return text[len(text) - length :]


def _longest(text: str, width: int, part: Callable[[int], str]) -> int:
    length = min(len(text), width)
    while cells(part(length)) > width:
        length -= 1
    return length
