"""Foreign text in GitHub-flavoured Markdown: it can form no markup, no link and no mention.

In: any `str`. Out: Markdown of one line. Knows nothing of reports.
"""

from __future__ import annotations

import re

from merge_gate.report.wording import words
from merge_gate.report.wording.untrusted import one_line

# What may stand in a backtick span as it is, in a table cell too.
_PLAIN_CODE = re.compile(r"[\w./+=,@%() -]*[\w./+=,@%()-]", re.ASCII)
# Markdown and HTML syntax, mathematics, and what GitHub makes links of in Markdown: www. and scheme:.
_SYNTAX = re.compile(r"[`*\\<>&\[\]|~$@#!]|(?<![^\W_])_|_(?![^\W_])|:(?=\S)|(?<=www)\.", re.IGNORECASE)
# What it makes links of later, in the text: @name and #123. A zero-width space is all that stops it outside of code.
_REFERENCE = re.compile(r"(&#(?:64|35);)(?=\w)")
# The sign of an e-mail address, which Markdown makes a link of inside of HTML's code too.
_ADDRESS = re.compile(r"(?<=[\w.+-])@(?=\w)")


def code(text: str, limit: int = words.NAME_LIMIT) -> str:
    """Return a name in code type. GitHub looks for neither mentions nor links in code."""
    line = one_line(text, limit)
    if _PLAIN_CODE.fullmatch(line):
        return f"`{line}`"
    parts = ("".join(map(_entity, part)) for part in _ADDRESS.split(line))
    return f"<code>{'&#64;&#8203;'.join(parts)}</code>"


def prose(text: str, limit: int = words.MESSAGE_LIMIT) -> str:
    """Return a sentence as plain text; what stands between backticks becomes code."""
    parts = one_line(text, limit).split("`")
    if len(parts) % 2 == 0:
        parts[-2:] = ["`".join(parts[-2:])]
    return "".join(code(part) if index % 2 and part.strip() else plain(part) for index, part in enumerate(parts))


def plain(text: str) -> str:
    """Return text on one line that forms no markup."""
    return _REFERENCE.sub(r"\1&#8203;", _SYNTAX.sub(lambda match: _entity(match[0]), text))


def _entity(character: str) -> str:
    """An entity is text to Markdown, never syntax."""
    is_syntax = character.isascii() and not character.isalnum() and character != " "
    return f"&#{ord(character)};" if is_syntax else character
