"""A partial directory: whole under its name, or gone; locked while it is written; foreign ones stay."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from merge_gate._internal.errors import NotPublishedError
from merge_gate._internal.locked_directory import DirectoryLock, locked_directory
from merge_gate.features.publish import partial as partial_module
from merge_gate.features.publish.partial import PartialDirectory, remove_leftovers
from merge_gate.features.publish.publish_directory import replaceable
from merge_gate.files.identity import directory_identity
from merge_gate.records.files import FileIdentity
from tests.support import published
from tests.support.publish_kills import KILLED_BEFORE_A_LOOK


def filled(parent: Path, name: str = "one") -> PartialDirectory:
    partial = PartialDirectory(parent / name)
    (partial.model / "model.safetensors").write_bytes(b"new")
    return partial


def names(parent: Path) -> set[str]:
    return {path.name for path in parent.iterdir()}


def test_it_gets_its_name_whole(tmp_path: Path) -> None:
    partial = filled(tmp_path)
    assert names(tmp_path) == {".one.partial"}
    partial.publish(replaces=None)
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
        partial.publish(replaces=None)
    partial.remove()
    assert names(tmp_path) == {"one"}
    assert names(tmp_path / "one") == (set() if is_empty else {"mine"})


def earlier(parent: Path) -> tuple[FileIdentity, ...]:
    """An earlier model under the name, and its identity."""
    (parent / "one").mkdir()
    (parent / "one" / "old").touch()
    return directory_identity(parent / "one")


@pytest.fixture(params=["exchange", "no exchange"])
def exchanges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system can exchange two directories."""
    if request.param == "no exchange":
        monkeypatch.setattr(partial_module, "renameat2", lambda *_: False)
    return bool(request.param == "exchange")


def test_an_earlier_publication_is_exchanged(tmp_path: Path, exchanges: bool) -> None:
    before = earlier(tmp_path)
    filled(tmp_path).publish(replaces=before)
    assert names(tmp_path) == {"one"}
    assert names(tmp_path / "one") == {"model.safetensors"}


@pytest.mark.attempt("Y62", "a publication with chmod 700 and 600 is replaced", "the permissions stay")
def test_the_permissions_of_an_earlier_publication_stay(tmp_path: Path, exchanges: bool) -> None:
    one = tmp_path / "one"
    for folder in (one, one / "sub"):
        folder.mkdir(mode=0o700)
        (folder / "model.safetensors").touch(mode=0o600)
    (one / "old").touch()
    partial = filled(tmp_path)
    (partial.model / "sub").mkdir()
    (partial.model / "sub" / "model.safetensors").touch()
    partial.publish(replaces=directory_identity(one))
    modes = {str(path.relative_to(one)): path.stat().st_mode & 0o777 for path in (one, *one.rglob("*"))}
    assert modes == {".": 0o700, "model.safetensors": 0o600, "sub": 0o700, "sub/model.safetensors": 0o600}


OTHERS: dict[str, Callable[[Path], object]] = {
    "a file more": lambda one: (one / "precious.txt").touch(),
    "an edit of equal size": lambda one: (one / "old").write_bytes(b""),
    "an empty folder": lambda one: (one / "folder").mkdir(),
    "another directory": lambda one: (one.rename(one.with_name("moved")), one.mkdir(), (one / "old").touch()),
    "a file": lambda one: (one.rename(one.with_name("moved")), one.write_text("precious")),
    "a link to it": lambda one: (one.rename(one.with_name("moved")), one.symlink_to("moved")),
}


@pytest.mark.attempt(
    "F11", "a directory takes DIR/NAME between the check and the exchange", "not published, and it stays"
)
@pytest.mark.parametrize("change", OTHERS)
def test_what_is_not_the_checked_model_goes_back(tmp_path: Path, exchanges: bool, change: str) -> None:
    before = earlier(tmp_path)
    partial = filled(tmp_path)
    OTHERS[change](tmp_path / "one")
    put_there = (tmp_path / "one").lstat().st_ino, directory_identity(tmp_path / "one")[1:]
    with pytest.raises(NotPublishedError):
        partial.publish(replaces=before)
    partial.remove()
    remove_leftovers(tmp_path)
    assert ((tmp_path / "one").lstat().st_ino, directory_identity(tmp_path / "one")[1:]) == put_there
    assert names(tmp_path) - {"moved"} == {"one"}


def test_what_cannot_go_back_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = earlier(tmp_path)
    partial = filled(tmp_path)
    (tmp_path / "one" / "precious.txt").touch()
    exchange = iter([True, False])
    real = partial_module.renameat2
    monkeypatch.setattr(partial_module, "renameat2", lambda *words: next(exchange) and real(*words))
    with pytest.raises(OSError, match=r"."):
        partial.publish(replaces=before)
    partial.remove()
    remove_leftovers(tmp_path)
    assert names(partial.model) == {"old", "precious.txt"}
    with pytest.raises(NotPublishedError):
        PartialDirectory(tmp_path / "one")


@pytest.mark.attempt("F06", "without exchange: the second rename fails (EIO, ENOSPC)", "the earlier model is put back")
def test_an_error_between_renames_puts_the_earlier_model_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = earlier(tmp_path)
    partial = filled(tmp_path)
    real = Path.rename

    def fail(source: Path, target: Path) -> Path:
        if source == partial.model:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(source, target)

    monkeypatch.setattr(partial_module, "renameat2", lambda *_: False)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match=r"."):
        partial.publish(replaces=before)
    partial.remove()
    assert names(tmp_path) == {"one"}
    assert directory_identity(tmp_path / "one")[1:] == before[1:]


KILLED_BETWEEN = """
import os, sys
from pathlib import Path
from merge_gate.files.identity import directory_identity
from merge_gate.features.publish import partial
place = Path(sys.argv[1])
made = partial.PartialDirectory(place / "one")
(made.model / "model.safetensors").write_bytes(b"new")
rename = Path.rename
def killed(source, target):
    if source == made.model and sys.argv[2] == "before":
        os.kill(os.getpid(), 9)
    renamed = rename(source, target)
    if source == made.model:
        os.kill(os.getpid(), 9)
    return renamed
partial.renameat2 = lambda *_: False
Path.rename = killed
made.publish(replaces=directory_identity(place / "one"))
"""


@pytest.mark.attempt(
    "F05", "without exchange: kill -9 between the two renames", "the next run puts the earlier model back"
)
@pytest.mark.parametrize("by", ["the same name", "another name"])
def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path, by: str) -> None:
    before = earlier(tmp_path)
    subprocess.run([sys.executable, "-c", KILLED_BETWEEN, str(tmp_path), "before"], check=False)
    assert names(tmp_path) == {".one.partial"}
    if by == "the same name":
        PartialDirectory(tmp_path / "one").remove()
    else:
        remove_leftovers(tmp_path)
    assert names(tmp_path) == {"one"}
    assert directory_identity(tmp_path / "one")[1:] == before[1:]


@pytest.mark.attempt("F05b", "the same, and a user makes a directory of that name before the next run", "both stay")
def test_an_earlier_model_whose_name_is_taken_waits(tmp_path: Path) -> None:
    before = earlier(tmp_path)
    subprocess.run([sys.executable, "-c", KILLED_BETWEEN, str(tmp_path), "before"], check=False)
    (tmp_path / "one").mkdir()
    remove_leftovers(tmp_path)
    assert names(tmp_path / "one") == set()
    with pytest.raises(NotPublishedError) as caught:
        PartialDirectory(tmp_path / "one")
    with pytest.raises(NotPublishedError) as taken:
        replaceable(tmp_path / "one", lambda _: None)
    assert all(".one.partial/replaced" in refused.value.hint for refused in (caught, taken))
    (tmp_path / "one").rmdir()
    remove_leftovers(tmp_path)
    assert directory_identity(tmp_path / "one")[1:] == before[1:]


@pytest.mark.attempt("F11c", "a user's file comes in before the exchange, and kill -9 after it", "no run removes it")
def test_a_kill_before_the_look_loses_nothing(tmp_path: Path) -> None:
    earlier(tmp_path)
    subprocess.run([sys.executable, "-c", KILLED_BEFORE_A_LOOK, str(tmp_path)], check=False)
    remove_leftovers(tmp_path)
    with pytest.raises(NotPublishedError):
        PartialDirectory(tmp_path / "one")
    assert names(tmp_path / ".one.partial" / "model") == {"old", "precious.txt"}


@pytest.mark.attempt(
    "F04b", "kill -9 right after the exchange, without a user's file", "the next run removes the leftover"
)
def test_a_kill_before_the_look_leaves_a_model_to_remove(tmp_path: Path) -> None:
    published.publish(tmp_path / "one")
    untouched = KILLED_BEFORE_A_LOOK.replace('(place / "one" / "precious.txt").touch()', "")
    subprocess.run([sys.executable, "-c", untouched, str(tmp_path)], check=False)
    assert names(tmp_path / ".one.partial" / "model") > set(published.FILES) - {"additional_chat_templates/x.jinja"}
    remove_leftovers(tmp_path)
    assert names(tmp_path) == {"one"}
    assert names(tmp_path / "one") == {"model.safetensors"}


@pytest.mark.attempt(
    "Y63", "a user edits weights in place before the exchange, and kill -9 after it", "no run removes it"
)
def test_a_kill_before_the_look_keeps_edited_weights(tmp_path: Path) -> None:
    published.publish(tmp_path / "one")
    name = next(name for name in published.FILES if name.endswith(".safetensors"))
    edited = b"x" * len(published.FILES[name])
    edits = f'(place / "one" / {name!r}).write_bytes({edited!r})'
    killed = KILLED_BEFORE_A_LOOK.replace('(place / "one" / "precious.txt").touch()', edits)
    subprocess.run([sys.executable, "-c", killed, str(tmp_path)], check=False)
    remove_leftovers(tmp_path)
    assert (tmp_path / ".one.partial" / "model" / name).read_bytes() == edited


@pytest.mark.attempt("F05c", "without exchange: kill -9 after the second rename", "the new model, and no leftover")
def test_a_kill_after_two_renames_leaves_the_new_model(tmp_path: Path) -> None:
    earlier(tmp_path)
    subprocess.run([sys.executable, "-c", KILLED_BETWEEN, str(tmp_path), "after"], check=False)
    assert names(tmp_path) == {"one", ".one.partial"}
    remove_leftovers(tmp_path)
    assert names(tmp_path) == {"one"}
    assert names(tmp_path / "one") == {"model.safetensors"}


@pytest.mark.attempt("F07b", "two writers of one name, at the lock", "the second is refused")
def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    first = filled(tmp_path)
    with pytest.raises(NotPublishedError):
        PartialDirectory(tmp_path / "one")
    remove_leftovers(tmp_path)
    assert (first.model / "model.safetensors").read_bytes() == b"new"
    PartialDirectory(tmp_path / "two").remove()
    first.remove()
    PartialDirectory(tmp_path / "one").remove()


KILLED = """
import os, sys
from pathlib import Path
from merge_gate.features.publish.partial import PartialDirectory
partial = PartialDirectory(Path(sys.argv[1], "one"))
(partial.model / "model.safetensors").write_bytes(b"half")
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("by", ["the same name", "another name"])
@pytest.mark.attempt("F03c", "kill -9 while the weights are written", "the next run removes the leftover")
def test_what_a_killed_run_left_is_removed(tmp_path: Path, by: str) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert names(tmp_path) == {".one.partial"}
    if by == "the same name":
        partial = PartialDirectory(tmp_path / "one")
        assert names(partial.model) == set()
        partial.remove()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == set()


def test_a_foreign_directory_of_that_name_stays(tmp_path: Path) -> None:
    place = tmp_path / ".one.partial"
    place.mkdir()
    (place / "mine").touch()
    with pytest.raises(NotPublishedError):
        PartialDirectory(tmp_path / "one")
    remove_leftovers(tmp_path)
    assert names(place) == {"mine"}


@pytest.mark.attempt("F10", "the partial directory is replaced by a link", "nothing in the link's target")
def test_a_link_of_that_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".one.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"."):
        PartialDirectory(tmp_path / "one")
    remove_leftovers(tmp_path)
    assert names(tmp_path / "elsewhere") == set()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_directory_that_another_run_just_removed_is_made_again(
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
    filled(tmp_path).publish(replaces=None)
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
        PartialDirectory(tmp_path / "one")
    remove_leftovers(tmp_path)
    assert names(partial.model) == {"model.safetensors"}


def test_an_error_while_it_is_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "touch", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        PartialDirectory(tmp_path / "one")
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
def test_a_file_system_that_cannot_exchange_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_taken: bool
) -> None:
    monkeypatch.setattr(partial_module, "renameat2", lambda *_: False)
    partial = filled(tmp_path)
    if is_taken:
        (tmp_path / "one").mkdir()
        with pytest.raises(NotPublishedError):
            partial.publish(replaces=None)
        partial.remove()
        assert names(tmp_path / "one") == set()
    else:
        partial.publish(replaces=None)
        assert names(tmp_path / "one") == {"model.safetensors"}


def test_a_flag_that_the_system_does_not_know(tmp_path: Path) -> None:
    assert partial_module.renameat2(tmp_path, tmp_path / "other", 1 << 20) is False
    with pytest.raises(FileNotFoundError):
        partial_module.renameat2(tmp_path / "absent", tmp_path / "other", 1)
