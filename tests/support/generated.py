"""Parts of documents that are made from code or runs: held against it, and written with UPDATE_GOLDENS=1."""

import os
import re
from pathlib import Path


def held(page: Path, name: str, made: str) -> None:
    """What stands between `<!-- name … -->` and `<!-- /name -->` in `page` is what was made."""
    if os.environ.get("UPDATE_GOLDENS"):
        write_block(page, name, made)
    (block,) = _block(name).findall(page.read_text(encoding="utf-8"))
    assert block[1] == made, "look at the difference, then run make schemas"


def write_block(page: Path, name: str, made: str) -> None:
    """Replace the text between `<!-- name … -->` and `<!-- /name -->` in `page`."""
    text = page.read_text(encoding="utf-8")
    block = _block(name)
    assert len(block.findall(text)) == 1, f"{page.name} has no block {name}"
    page.write_text(block.sub(lambda match: match[1] + made + match[3], text), encoding="utf-8")


def _block(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name}\b[^>]*-->\n)(.*?)(\n<!-- /{name} -->)", re.DOTALL)


# --- what tests read out of documents ---------------------------------------------------------------------------------

CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    return [body for kind, body in CODE_BLOCK.findall(text) if kind == language]


def without_numbers(text: str) -> str:
    return re.sub(r"[\d,]*\d(\.\d+)?(e[+-]?\d+)?", "#", re.sub(r"\s+", " ", text)).strip()
