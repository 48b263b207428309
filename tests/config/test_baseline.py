"""The baseline's file: what is read, and what is wrong with it, at its place."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

import pytest

from merge_gate.config.load import load_config
from merge_gate.errors import ConfigError
from tests.support.config.baselines import DIGEST, ENTRY, GOOD

if TYPE_CHECKING:
    from pathlib import Path


def load(place: Path, text: str | None):
    (place / "a").mkdir()
    (place / "gate.yml").write_text("version: 1\nadapters: [./a]\nbaseline: known.yml\n", encoding="utf-8")
    if text is not None:
        (place / "known.yml").write_text(text, encoding="utf-8")
    return load_config(str(place / "gate.yml"))


def test_what_is_read(tmp_path: Path) -> None:
    (one,) = load(tmp_path, GOOD + "    also: [headroom]\n").baseline
    assert (one.adapter, one.cause, one.also) == (DIGEST, "no-effect", ("headroom",))
    assert (one.reason, one.owner, one.until, one.line) == ("a stub", "team-a", dt.date(2026, 12, 31), 3)


def test_one_that_is_empty_accepts_nothing(tmp_path: Path) -> None:
    assert load(tmp_path, "version: 1\naccept: []\n").baseline == ()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "known.yml:1:1: no such file"),
        ("version: 1\n", '"accept" is missing'),
        (GOOD.replace("a stub", '""'), '5:13: "reason" is empty'),
        (GOOD.replace("    owner: team-a\n", ""), '"owner" is missing'),
        (GOOD.replace("2026-12-31", "soon"), '"until" must be a day such as 2026-12-31'),
        (GOOD.replace("2026-12-31", "2026-02-30"), '"2026-02-30" is no day'),
        (GOOD.replace("no-effect", "no-efect"), 'there is no check "no-efect"'),
        (GOOD.replace(DIGEST, "team-*"), '"adapter" must be 64 hexadecimal digits'),
        (GOOD.replace("cause: no-effect", 'cause: "*"'), 'there is no check "*"'),
        (GOOD + ENTRY, "8:5: this adapter and cause are accepted already (first in line 3)"),
        (GOOD + "    dtype: float16\n", 'unknown key "dtype"'),
    ],
)
def test_what_is_wrong_is_said_at_its_place(tmp_path: Path, text: str | None, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert problem in "\n".join(map(str, caught.value.problems))
