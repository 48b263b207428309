"""Escapes foreign text for GitHub-flavored Markdown, on one line: it cannot form markup, links, or mentions."""

from __future__ import annotations

import re

from merge_gate.report.wording import words
from merge_gate.report.wording.untrusted import one_line, shorten_between_words

# Text that needs no escaping in a backtick span, not even in a table cell.
_PLAIN_CODE = re.compile(r"[\w./+=,@%() -]*[\w./+=,@%()-]", re.ASCII)
# Markdown and HTML syntax, mathematics, and what GitHub turns into links in Markdown: www. and scheme:.
_SYNTAX = re.compile(r"[`*\\<>&\[\]|~$@#!]|(?<![^\W_])_|_(?![^\W_])|:(?=\S)|(?<=www)\.", re.IGNORECASE)
# What GitHub turns into links later: @name, e-mail addresses, #123, GH-123, and commits. Outside of code, only a
# zero-width space prevents it.
_REFERENCE = re.compile(r"&#64;(?=[\w./-])|&#35;(?=\w)|\bGH-(?=\d)|\b[0-9a-f]{7,40}\b", re.ASCII | re.IGNORECASE)
# The sign of an e-mail address, which Markdown turns into a link even inside of HTML's code.
_ADDRESS = re.compile(r"@(?=[\w./-])")


def code(text: str, length: int = words.NAME_LENGTH) -> str:
    """Return a name as code. GitHub ignores mentions and links in code."""
    line = one_line(text, length)
    if _PLAIN_CODE.fullmatch(line):
        return f"`{line}`"
    parts = ("".join(map(_entity, part)) for part in _ADDRESS.split(line))
    return f"<code>{'&#64;&#8203;'.join(parts)}</code>"


def prose(text: str, length: int = words.MESSAGE_LENGTH) -> str:
    """Return a sentence as plain text. Text between backticks becomes code."""
    line = shorten_between_words(one_line(text), length)
    parts = re.sub("` ?`", " ", line).split("`")  # no code in between: its neighbors stay apart
    if len(parts) % 2 == 0:
        parts[-2:] = ["`".join(parts[-2:])]
    return "".join(code(part) if index % 2 else plain(part) for index, part in enumerate(parts))


def plain(text: str) -> str:
    """Return text of one line that forms no markup."""
    escaped = _SYNTAX.sub(lambda match: _entity(match[0]), text)
    return _REFERENCE.sub(lambda match: re.sub(".{1,6}", r"\g<0>&#8203;", match[0]), escaped)


def _entity(character: str) -> str:
    """Escape a character as an entity, which Markdown never reads as syntax."""
    is_syntax = character.isascii() and not character.isalnum() and character != " "
    return f"&#{ord(character)};" if is_syntax else character
