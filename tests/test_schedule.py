"""The lists of `tests.support.schedule` name files that exist, and all files that share an expensive fixture."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.schedule import FIRST, ONE_BY_ONE, TOGETHER

ROOT = Path(__file__).resolve().parents[1]


def test_every_listed_file_exists() -> None:
    assert [file for file in (*TOGETHER, *ONE_BY_ONE) if not (ROOT / file).is_file()] == []
    assert not ONE_BY_ONE & TOGETHER.keys()
    assert [unit for unit in FIRST if unit not in TOGETHER.values() and not (ROOT / unit).is_file()] == []
    assert not {*ONE_BY_ONE, *TOGETHER} & {*FIRST}, "no such unit of work"


def test_every_file_that_needs_the_judged_cases_is_in_their_group() -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"\bjudged: Judged\b", path.read_text(encoding="utf-8"))
    }
    assert users == {file for file, group in TOGETHER.items() if group == "judged"}
