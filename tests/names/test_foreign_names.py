"""Names from outside that become paths: one rule for listings, indexes, manifests, and headers."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_gate.names.foreign_names import COMMIT, is_inside


@given(st.lists(st.sampled_from(["a", "..", ".", "", "b c"]), max_size=4).map("/".join))
def test_a_name_that_is_inside_has_one_spelling(name: str) -> None:
    inside = os.path.normpath(f"/top/{name}")
    assert is_inside(name) == (inside == f"/top/{name}" and inside != "/top")


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/x", "a/../x", "a//x", "./x", "a\\x", "a/", "", ".", "a\0", "a\n", "\ud800", "a" * 256, 7, None],
)
def test_a_name_that_leads_elsewhere_or_that_no_file_can_have_is_refused(name: object) -> None:
    assert not is_inside(name)


@pytest.mark.parametrize("name", ["model.safetensors", "sub/model.safetensors", "..a", "a..b", "名.json", "a" * 255])
def test_other_names_are_not(name: str) -> None:
    assert is_inside(name)


@pytest.mark.parametrize(
    ("name", "is_commit"),
    [
        ("0a" * 20, True),
        ("0a" * 32, False),
        ("0A" * 20, False),
        ("0a" * 19, False),
        ("0a" * 20 + "\n", False),
        ("main", False),
    ],
)
def test_a_commit_is_a_digest(name: str, is_commit: bool) -> None:
    assert bool(COMMIT.fullmatch(name)) == is_commit
