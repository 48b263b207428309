"""Parts of documents that are made from the code: held against it, and written anew with UPDATE_GOLDENS=1."""

from __future__ import annotations

import os
import re
from pathlib import Path


def held(page: Path, name: str, made: str) -> None:
    """What stands between `<!-- name … -->` and `<!-- /name -->` in `page` is what was made."""
    text = page.read_text(encoding="utf-8")
    block = re.compile(rf"(<!-- {name}\b[^>]*-->\n)(.*?)(\n<!-- /{name} -->)", re.DOTALL)
    assert len(block.findall(text)) == 1, f"{page.name} has no block {name}"
    if os.environ.get("UPDATE_GOLDENS"):
        page.write_text(block.sub(lambda match: match[1] + made + match[3], text), encoding="utf-8")
        return
    assert block.findall(text)[0][1] == made, "look at the difference, then run make schemas"
