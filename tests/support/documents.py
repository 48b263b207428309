"""What tests read out of the project's documents.

In: the text of a page. Out: its code blocks, and text to compare without its figures.
"""

from __future__ import annotations

import re

CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    return [body for kind, body in CODE_BLOCK.findall(text) if kind == language]


def without_numbers(text: str) -> str:
    return re.sub(r"[\d,]*\d(\.\d+)?(e[+-]?\d+)?", "#", re.sub(r"\s+", " ", text)).strip()
