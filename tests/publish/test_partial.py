"""A partial directory: whole under its name, or gone; locked while it is written; foreign ones stay."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from merge_gate.claimed_directory import DirectoryLock, locked_directory
from merge_gate.errors import NotPublishedError
from merge_gate.publish import partial as partial_module
from merge_gate.publish.partial import PartialDirectory, remove_leftovers


def filled(parent: Path, name: str = "one") -> PartialDirectory:
    partial = PartialDirectory(parent, name)
    (partial.model / "model.safetensors").write_bytes(b"new")
    return partial


def names(parent: Path) -> set[str]:
    return {path.name for path in parent.iterdir()}


def test_it_gets_its_name_whole(tmp_path: Path) -> None:
    partial = filled(tmp_path)
    assert names(tmp_path) == {".one.partial"}
    partial.publish(replace=False)
    assert names(tmp_path) == {"one"}
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == b"new"


def test_it_is_removed_with_all_that_it_holds(tmp_path: Path) -> None:
    partial = filled(tmp_path)
    partial.remove()
    partial.remove()
    assert names(tmp_path) == set()


@pytest.mark.parametrize("is_empty", [True, False])
def test_what_has_taken_the_name_meanwhile_stays(tmp_path: Path, is_empty: bool) -> None:
    partial = filled(tmp_path)
    (tmp_path / "one").mkdir()
    if not is_empty:
        (tmp_path / "one" / "mine").touch()
    with pytest.raises(NotPublishedError):
        partial.publish(replace=False)
    partial.remove()
    assert names(tmp_path) == {"one"}
    assert names(tmp_path / "one") == (set() if is_empty else {"mine"})


@pytest.mark.parametrize("has_renameat2", [True, False])
def test_an_earlier_publication_is_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_renameat2: bool
) -> None:
    if not has_renameat2:
        monkeypatch.setattr(partial_module, "_renameat2", lambda *_: False)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "old").touch()
    filled(tmp_path).publish(replace=True)
    assert names(tmp_path) == {"one"}
    assert names(tmp_path / "one") == {"model.safetensors"}


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    first = filled(tmp_path)
    with pytest.raises(NotPublishedError):
        PartialDirectory(tmp_path, "one")
    remove_leftovers(tmp_path)
    assert (first.model / "model.safetensors").read_bytes() == b"new"
    PartialDirectory(tmp_path, "two").remove()
    first.remove()
    PartialDirectory(tmp_path, "one").remove()


KILLED = """
import os, sys
from pathlib import Path
from merge_gate.publish.partial import PartialDirectory
partial = PartialDirectory(Path(sys.argv[1]), "one")
(partial.model / "model.safetensors").write_bytes(b"half")
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("by", ["the same name", "another name"])
def test_what_a_killed_run_left_is_removed(tmp_path: Path, by: str) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert names(tmp_path) == {".one.partial"}
    if by == "the same name":
        partial = PartialDirectory(tmp_path, "one")
        assert names(partial.model) == set()
        partial.remove()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == set()


def test_a_foreign_directory_of_that_name_stays(tmp_path: Path) -> None:
    place = tmp_path / ".one.partial"
    place.mkdir()
    (place / "mine").touch()
    with pytest.raises(NotPublishedError):
        PartialDirectory(tmp_path, "one")
    remove_leftovers(tmp_path)
    assert names(place) == {"mine"}


def test_a_link_of_that_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".one.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"."):
        PartialDirectory(tmp_path, "one")
    remove_leftovers(tmp_path)
    assert names(tmp_path / "elsewhere") == set()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_directory_that_another_run_has_just_removed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    removals = iter([True])

    @contextlib.contextmanager
    def racing(path: Path, *, follow: bool) -> Iterator[DirectoryLock]:
        is_first = next(removals, False)
        if is_first and when == "before":
            path.rmdir()
        with locked_directory(path, follow=follow) as lock:
            if is_first:
                path.rmdir()
            yield lock

    monkeypatch.setattr(partial_module, "locked_directory", racing)
    filled(tmp_path).publish(replace=False)
    assert names(tmp_path) == {"one"}


def test_without_locks_a_leftover_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def unlocked(path: Path, *, follow: bool) -> Iterator[DirectoryLock]:
        with locked_directory(path, follow=follow) as lock:
            yield lock._replace(is_held=False)

    monkeypatch.setattr(partial_module, "locked_directory", unlocked)
    partial = filled(tmp_path)
    partial._stack.close()
    with pytest.raises(NotPublishedError):
        PartialDirectory(tmp_path, "one")
    remove_leftovers(tmp_path)
    assert names(partial.model) == {"model.safetensors"}


def test_an_error_while_it_is_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "touch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        PartialDirectory(tmp_path, "one")
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == set()


def test_a_file_in_the_place_of_the_model_is_removed(tmp_path: Path) -> None:
    partial = filled(tmp_path)
    partial._stack.close()
    (partial.model / "model.safetensors").unlink()
    partial.model.rmdir()
    partial.model.touch()
    filled(tmp_path).remove()
    assert names(tmp_path) == set()


@pytest.mark.parametrize("is_taken", [True, False])
def test_a_file_system_that_cannot_exchange_still_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_taken: bool
) -> None:
    monkeypatch.setattr(partial_module, "_renameat2", lambda *_: False)
    partial = filled(tmp_path)
    if is_taken:
        (tmp_path / "one").mkdir()
        with pytest.raises(NotPublishedError):
            partial.publish(replace=False)
        partial.remove()
        assert names(tmp_path / "one") == set()
    else:
        partial.publish(replace=False)
        assert names(tmp_path / "one") == {"model.safetensors"}


def test_a_flag_that_the_system_does_not_know(tmp_path: Path) -> None:
    assert partial_module._renameat2(tmp_path, tmp_path / "other", 1 << 20) is False
    with pytest.raises(FileNotFoundError):
        partial_module._renameat2(tmp_path / "absent", tmp_path / "other", 1)
