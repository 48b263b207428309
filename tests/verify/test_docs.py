"""docs/guides/verify.md lists every kind of answer."""

from __future__ import annotations

from pathlib import Path

from merge_gate.verify.kinds import ALLOWED, KINDS
from tests.support.generated import held

PAGE = Path(__file__).parents[2] / "docs" / "guides/verify.md"


def test_the_page_has_a_table_of_the_kinds() -> None:
    rows = [f"| `{kind.id}` | {kind.summary} | {kind.hint or 'nothing'} |" for kind in KINDS.values()]
    held(PAGE, "kinds", "\n".join(["", "| kind | when | what to do |", "|---|---|---|", *rows, ""]))


def test_a_good_kind_is_not_allowed_but_good() -> None:
    assert set(ALLOWED) == set(KINDS) - {"exact", "other-order", "rounding", "as-published", "attested", "attestation"}
