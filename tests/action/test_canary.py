"""What must hold inside the container, and what is said where it does not."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from merge_gate.action.docker import canary
from merge_gate.errors import LauncherError
from tests.support.wording import Wording

if TYPE_CHECKING:
    from pathlib import Path


def test_canaries_that_are_there(tmp_path: Path) -> None:
    planted = canary.plant(tmp_path)
    assert canary.verify(canary.expectations({planted: planted}, ""), tmp_path) == []


def test_nothing_is_asked_by_hand(tmp_path: Path) -> None:
    assert canary.verify({"PATH": "/bin"}, tmp_path) == []


def test_two_canaries_differ(tmp_path: Path) -> None:
    first, second = canary.plant(tmp_path), canary.plant(tmp_path)
    assert first != second
    assert first.read_text() != second.read_text()


@pytest.mark.parametrize("change", ["gone", "other", "directory"])
def test_a_mount_that_is_not_the_one(tmp_path: Path, change: str, wording: Wording) -> None:
    planted = canary.plant(tmp_path)
    expected = canary.expectations({planted: planted}, "")
    planted.unlink()
    if change == "other":
        planted.write_text("other", encoding="utf-8")
    if change == "directory":
        planted.mkdir()
    with pytest.raises(LauncherError) as raised:
        canary.verify(expected, tmp_path)
    wording(re.sub(r"canary-\w+", "canary-<random>", f"{raised.value.message}\n{raised.value.hint}"))


@pytest.mark.parametrize("name", ["nvidia0", "nvidia15", "nvhost-gpu", "dxg"])
def test_a_gpu_that_was_asked_for(tmp_path: Path, name: str, wording: Wording) -> None:
    expected = canary.expectations({}, "all")
    (tmp_path / "nvme0n1").touch()
    with pytest.raises(LauncherError) as raised:
        canary.verify(expected, tmp_path)
    wording(raised.value)
    (tmp_path / name).touch()
    assert canary.verify(expected, tmp_path) == [str(tmp_path / name)]
    assert canary.verify(canary.expectations({}, ""), tmp_path) == [], "not asked for, not looked at"


@pytest.mark.parametrize(
    ("asked", "there", "enough"),
    [
        ("0,1", ["nvidia0"], False),
        ("0,1", ["nvidia0", "nvidia1", "nvidiactl"], True),
        ("GPU-1,GPU-2", ["nvidia3", "nvidiactl"], False),
        ("all", ["nvidia0"], True),
        ("MIG-1,MIG-2", ["nvidia0"], True),
        ("0,1", ["nvhost-gpu"], True),
    ],
)
def test_the_gpus_that_were_asked_for_are_counted(
    tmp_path: Path, asked: str, there: list[str], enough: bool, wording: Wording
) -> None:
    for name in there:
        (tmp_path / name).touch()
    expected = canary.expectations({}, asked)
    if enough:
        assert len(canary.verify(expected, tmp_path)) == len(there)
    else:
        with pytest.raises(LauncherError) as raised:
            canary.verify(expected, tmp_path)
        wording(raised.value)
