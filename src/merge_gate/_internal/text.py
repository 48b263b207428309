"""Formats foreign text, lists of names, and counts for sentences; says what text can be a name, a number, or a size.

It uses only the standard library and Python 3.9, because the action's own Python imports it too.
"""

from __future__ import annotations

import os
import re
import textwrap
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

# Control, format (bidi overrides, zero width), surrogate, line and paragraph separators.
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
# Letters that look empty: Hangul fillers, and the blank braille cell.
_BLANK_LETTERS = frozenset("\u115f\u1160\u3164\uffa0\u2800")

_MOST_PATH_BYTES, _MOST_NAME_BYTES = 4095, 255  # of Linux

WIDEST, WIDEST_TABLE = 80, 120
"""The most columns of text and of tables for people, however wide their terminal is."""

COMMIT = re.compile(r"[0-9a-f]{40}")
"""A full commit of the Hub. huggingface_hub asks the server again for the commit of any other name."""

NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
"""A number as a user writes it."""

SIZE = r"^[1-9]\d{0,11}(\.\d{1,3})? ?(KB|MB|GB|TB|KiB|MiB|GiB|TiB)$"
"""A size as a user writes it: `5GB`, `500 MiB`."""


MOST_FOREIGN = 300
"""The most characters of a text from outside that a message repeats."""

# A path of pathlib has one slash after the scheme. A password may have quotes. Marks at the end are the sentence's.
_URL = re.compile(r"(?<![\w+.-])([\w+.-]{2,}://?)([^\s<>`]*[^\s<>`\"'),.;:\]}])")
# `user:password@host` with or without a scheme, and a password with up to 4 blanks. A digest behind the @ is no host
# (`image:tag@sha256:…`), `C:\` is no user, and `file.yml:3: …` and `file.yml:3:5: …` are places. Each repeated part
# ends where the next one begins: text of strangers has to take linear time.
_PASSWORD = re.compile(
    r"(?<!\S)([^\s:]*[\w+.-]{2}://?(?=[^/@:\n]+:)|[\"'(\[{]*(?:[\w.-]+=)?(?![A-Za-z]:\\)(?=[\w.+%-]+:))"
    r"[^/@:\n]+:(?!(?:\d+:){1,2}\s|[\s/])\S*(?:[ \t]+(?!\S*:/)\S+){0,4}[ \t]*(?=@(?!sha256:)[\w\[])"
)
_TOKENS, _LEAST_TOKEN = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"), 8
_LONG_WORD = re.compile(rf"\S{{{MOST_FOREIGN + 1},}}")
_MARKS, _MOST_MARKS = "\"'),.;:]}", 4


def without_credentials(text: str) -> str:
    """`text` without the token of the Hub, and without what may be secret in URLs: all before an `@`, and the query."""
    for token in (os.environ.get(name, "").strip() for name in _TOKENS):
        if len(token) >= _LEAST_TOKEN:
            text = text.replace(token, "***")
    if ":" in text and "@" in text:
        text = _PASSWORD.sub(r"\1…", text)
    return _URL.sub(_without_credentials, text) if ":/" in text else text


def _without_credentials(url: re.Match[str]) -> str:
    scheme, rest = url[1], url[2]
    at, query = rest.rfind("@"), rest.find("?")
    if at < 0 and query < 0:
        return url[0]
    if 0 <= query < at:  # the query has the @, or the password has the ?
        return f"{scheme}…"
    path, question, _ = rest[max(at, 0) :].partition("?")
    return f"{scheme}{'…' if at >= 0 else ''}{path}{question and '?…'}"


def repeatable(text: str) -> str:
    """A message without the credentials of URLs, and with words of `MOST_FOREIGN` characters at most.

    Only text from outside has longer words.
    """
    text = without_credentials(text)
    return _LONG_WORD.sub(_shortened, text) if len(text) > MOST_FOREIGN else text


def _shortened(word: re.Match[str]) -> str:
    """A long word, and the marks of the sentence behind it."""
    own = word[0].rstrip(_MARKS)
    marks = word[0][len(own) :][:_MOST_MARKS]
    return (own if len(own) <= MOST_FOREIGN else f"{own[: MOST_FOREIGN - 1]}…") + marks


def is_hidden(character: str) -> bool:
    """Whether a character is invisible, or changes the visible order of others."""
    return unicodedata.category(character) in _HIDDEN_CATEGORIES or character in _BLANK_LETTERS


def has_hidden(text: str) -> bool:
    """Whether any character of `text` is hidden. Tabs and line breaks count as hidden."""
    return not (text.isascii() and text.isprintable()) and any(map(is_hidden, text))


def quoted(text: str, most: int = 60, mark: str = '"') -> str:
    """`text` between two `mark`s, cut to `most` characters, and without the credentials of its URLs.

    Hidden and unprintable characters are escaped.
    """
    text = without_credentials(text)
    shown = text if len(text) <= most else f"{text[: most - 1]}…"
    if shown.isprintable() and not has_hidden(shown):
        return f"{mark}{shown}{mark}"
    escaped = (c if c.isprintable() and not is_hidden(c) else c.encode("unicode_escape").decode() for c in shown)
    return f"{mark}{''.join(escaped)}{mark}"


def foreign(text: str) -> str:
    """`text` from outside between single quotes, as a message repeats it."""
    return quoted(text, MOST_FOREIGN, "'")


def listing(names: Iterable[str], most: int = 5) -> str:
    """`a, b, c and 4 more`."""
    every = list(names)
    shown = ", ".join(every[:most])
    return f"{shown} and {len(every) - most:,} more" if len(every) > most else shown


def counted(count: int, singular: str, plural: str = "") -> str:
    """(1, "adapter") → 1 adapter, (2, "adapter") → 2 adapters. `plural` is needed if it is not `singular` and an s."""
    return f"{count:,} {singular if count == 1 else plural or f'{singular}s'}"


def wrapped(text: str, width: int, first: str = "", rest: str = "") -> list[str]:
    """The lines of a text, with these indents. A name stays whole, so that it can be copied."""
    wrapper = textwrap.TextWrapper(
        width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False
    )
    return wrapper.wrap(" ".join(text.split()))


def unusable(name: str) -> str:
    """Why a text can be no name of a file, directory, or repository; empty if it can."""
    if not name.strip():
        return "is empty (a variable that is not set?)"
    try:
        path = os.fsencode(name)
        path.decode("utf-8")
    except UnicodeError:
        return f"is {quoted(name)}, expected a name in UTF-8"
    if "\0" in name:
        return f"is {quoted(name)}, expected a name without NUL"
    if len(path) > _MOST_PATH_BYTES or max(map(len, path.split(b"/"))) > _MOST_NAME_BYTES:
        return f"is {quoted(name)} and has {len(name):,} characters, expected a shorter name"
    return ""


def is_inside(name: object) -> bool:
    """Whether a relative name stays inside of its directory, has one spelling only, and can be the name of a file."""
    if not isinstance(name, str) or "\\" in name or "\0" in name:
        return False
    parts = name.encode("utf-8", "surrogatepass").split(b"/")
    return not {b"", b".", b".."} & set(parts) and max(map(len, parts)) <= _MOST_NAME_BYTES and name.isprintable()


def size_bytes(text: str) -> int:
    """The size in bytes. KB is 1,000 bytes, as in transformers, and KiB is 1,024.

    Raises:
        ValueError: the text is no size.
    """
    if not re.fullmatch(SIZE, text, re.ASCII):
        raise ValueError(text)
    number, letter, is_binary = re.fullmatch(r"([\d.]+) ?([KMGT])(i?)B", text, re.ASCII).groups()  # type: ignore[union-attr] # it matched above
    return int(float(number) * (1024 if is_binary else 1000) ** "_KMGT".index(letter))


def shown_bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB" if count >= 1000 else counted(count, "byte")  # noqa: PLR2004


def gibibytes(count: float) -> str:
    """A number of bytes in GiB."""
    return f"{count / 2**30:.1f} GiB"


def one_of(words: Iterable[str]) -> str:
    """`a, b or c`."""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else str(last)
