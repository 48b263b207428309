"""What the package stores of the pages of kinds, which `merge-gate explain` prints."""

import re
from collections.abc import Mapping


def kinds_to_store(pages: Mapping[str, str], verify: str) -> str:
    """A section for each kind: the pages of docs/checks that are of no check, and the sections of guides/verify.md."""
    own = [(kind, page.partition("\n")[2]) for kind, page in pages.items()]
    answers = re.findall(r"^### (\S+)\n\n(.*?)(?=^##)", verify, re.MULTILINE | re.DOTALL)
    return "\n\n".join(f"## {kind}\n\n{text.strip()}" for kind, text in (*own, *answers)) + "\n"
