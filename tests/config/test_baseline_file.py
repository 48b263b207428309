"""The baseline's file: what is read, and what is wrong with it, at its place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from merge_gate._internal.errors import ConfigError
from merge_gate.config.load_config import load_config
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
    assert (one.reason, one.owner, one.until, one.line) == ("a stub", "team-a", "2026-12-31", 3)


def test_one_that_is_empty_accepts_nothing(tmp_path: Path) -> None:
    assert load(tmp_path, "version: 1\naccept: []\n").baseline == ()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "known.yml: the file cannot be read"),
        ("version: 1\n", '"accept"'),
        (GOOD.replace("a stub", '""'), "5:13"),
        (GOOD.replace("    owner: team-a\n", ""), '"owner"'),
        (GOOD.replace("2026-12-31", "soon"), '"until"'),
        (GOOD.replace("2026-12-31", "2026-02-30"), '"2026-02-30"'),
        (GOOD.replace("no-effect", "no-efect"), '"no-efect"'),
        (GOOD.replace(DIGEST, "team-*"), '"adapter"'),
        (GOOD.replace("cause: no-effect", 'cause: "*"'), '"*"'),
        (GOOD + ENTRY, "8:5"),
        (GOOD + "    dtype: float16\n", '"dtype"'),
    ],
)
def test_a_problem_names_its_place(tmp_path: Path, text: str | None, named: str) -> None:
    """The sentences are in messages.txt."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert named in str(caught.value)


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    load(tmp_path, GOOD)
    (tmp_path / "known.yml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"known\.yml:1:1"):
        load_config(str(tmp_path / "gate.yml"))
