"""What the package stores of the pages of kinds, which `merge-gate explain` prints."""

import re
from collections.abc import Iterable, Mapping

from merge_gate.judging.kinds import ANSWERS


def kinds_to_store(pages: Mapping[str, str], guides: Iterable[str]) -> str:
    """A section for each kind: the pages of docs/checks that are of no check, and the sections of the guides.

    What a kind with a cause means, and what to do, are in the table of a guide.
    """
    own = [(kind, page.partition("\n")[2].strip()) for kind, page in pages.items()]
    found = (re.findall(r"^### (\S+)\n\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL) for page in guides)
    answers = [(kind, _explained(kind, text.strip())) for part in found for kind, text in part]
    return "\n\n".join(f"## {kind}\n\n{text}" for kind, text in (*own, *answers)) + "\n"


def _explained(kind: str, section: str) -> str:
    """A section between the sentences of the table. A good answer has no cause, and its section says what it means."""
    meaning = "" if ANSWERS[kind].is_good else f"{ANSWERS[kind].summary}\n\n"
    return f"{meaning}{section}\n\n**What to do.** {to_do(kind)}"


def to_do(kind: str) -> str:
    """The hint of a kind as a sentence."""
    hint = ANSWERS[kind].hint or "nothing"
    return f"{hint[0].upper()}{hint[1:]}."
