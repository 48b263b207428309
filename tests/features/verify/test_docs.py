"""docs/guides/verify.md and verify-quantized.md list every kind of answer."""

import os
import re
from pathlib import Path

import pytest

from merge_gate.cli.dispatch import main
from merge_gate.features.verify.expected_differences import ROWS
from merge_gate.judging.checks.table import CHECKS
from merge_gate.judging.kinds import ALLOWED, ANSWERS, WITHOUT_SETTING
from merge_gate.report.wording.explanations import STORED_KINDS, explanation
from tests.support.generated import held
from tests.support.stored_pages import kinds_to_store, to_do

PAGE = Path(__file__).parents[3] / "docs" / "guides/verify.md"
PAGES = (PAGE, PAGE.with_name("verify-quantized.md"))
MOVED = ("erased", "not-measurable", "not-in-format", "applied")
"""Kinds whose sections were on the first page, whose anchors lead to the second one."""

CHECKS_FOLDER = PAGE.parents[1] / "checks"


def test_the_page_has_a_table_of_the_expected_differences() -> None:
    rows = [f"| {row.shown} | {row.writer} | {row.reason} |" for row in ROWS]
    head = ["", "| difference | who writes it | why the meaning is the same |", "|---|---|---|"]
    held(PAGE, "expected differences", "\n".join([*head, *rows, ""]))


def test_the_page_has_each_kind_and_the_package_a_copy_of_them() -> None:
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    for path, page in zip(PAGES, pages, strict=True):
        of_page = [kind for kind, row in ANSWERS.items() if row.page == path.stem]
        assert re.findall(r"^### (.+)$", page, re.MULTILINE) == of_page
    own = {kind: (CHECKS_FOLDER / f"{kind}.md").read_text(encoding="utf-8") for kind in WITHOUT_SETTING}
    if os.environ.get("UPDATE_GOLDENS"):
        STORED_KINDS.write_text(kinds_to_store(own, pages), encoding="utf-8")
    assert STORED_KINDS.read_text(encoding="utf-8") == kinds_to_store(own, pages), "run make schemas"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_begins_with_a_table_of_the_kinds(page: Path) -> None:
    rows = [
        f"| [{kind}](#{kind}) | {row.summary} | {to_do(kind)} |"
        for kind, row in ANSWERS.items()
        if row.page == page.stem
    ]
    head = ["", "| you see | it means | what to do |", "|---|---|---|"]
    held(page, "results", "\n".join([*head, *rows, ""]))


def test_the_anchors_of_kinds_on_another_page_lead_there() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert {kind for kind, row in ANSWERS.items() if row.page != PAGE.stem} == set(MOVED)
    assert all(f'<a id="{kind}"></a>[{kind}](verify-quantized.md#{kind})' in text for kind in MOVED)


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_kind_is_explained_in_text_without_marks(kind: str) -> None:
    text = explanation(kind, 72)
    assert text.startswith(f"{kind}\n\n")
    assert ANSWERS[kind].is_good or "How it happens." in text
    assert "What to do." in text
    assert max(map(len, text.splitlines())) <= 120, "only an address is longer than the width"
    assert not re.search(r"\*\*|```|\]\(", text)


def test_explain_knows_the_kinds_and_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "not-carried"]) == 0
    assert "multi-token" in capsys.readouterr().out
    assert main(["explain"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n{kind} " in listed for kind in ANSWERS)
    assert not CHECKS.keys() & ANSWERS.keys(), "a check and a kind of one name could not be told apart"


def test_a_good_kind_is_not_allowed_but_good() -> None:
    good = {"exact", "other-order", "rounding", "as-published", "applied"}
    never = {"broken-files", "other-architecture", "wrong-base", "erased", "not-measurable"}
    assert set(ALLOWED) == set(ANSWERS) - good - never
