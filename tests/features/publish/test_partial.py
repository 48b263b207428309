"""A partial directory: whole under its name, or gone; locked while it is written; foreign ones stay."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
from tests.support.played_merges import lay
from tests.support.publish_kills import KilledRuns, killed, killed_before_a_look, lay_real
from tests.support.wording import Wording


def filled(parent: Path, name: str = "one") -> PartialDirectory:
    partial = PartialDirectory(parent / name)
    (partial.model / "model.safetensors").write_bytes(b"new")
    return partial


def names(parent: Path) -> set[str]:
    return {path.name for path in parent.iterdir()}


def earlier(parent: Path) -> tuple[FileIdentity, ...]:
    """An earlier model under the name, and its identity."""
    (parent / "one").mkdir()
    (parent / "one" / "old").touch()
    return directory_identity(parent / "one")


@pytest.fixture(params=["exchange", "no exchange"])
def exchanges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the file system can exchange two directories."""
    if request.param == "no exchange":
        monkeypatch.setattr(partial_module, "renameat2", lambda *_: False)


@pytest.mark.usefixtures("exchanges")
def test_it_gets_its_name_whole(tmp_path: Path) -> None:
    partial = filled(tmp_path)
    assert names(tmp_path) == {".one.partial"}
    partial.publish(replaces=None)
    assert names(tmp_path) == {"one"}
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == b"new"


@pytest.mark.attempt("F11b", "an empty directory takes DIR/NAME during the run", "not published, and it stays")
@pytest.mark.parametrize("is_empty", [True, False])
@pytest.mark.usefixtures("exchanges")
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


@pytest.mark.usefixtures("exchanges")
def test_an_earlier_publication_is_exchanged(tmp_path: Path) -> None:
    before = earlier(tmp_path)
    filled(tmp_path).publish(replaces=before)
    assert names(tmp_path) == {"one"}
    assert names(tmp_path / "one") == {"model.safetensors"}


@pytest.mark.attempt("Y62", "a publication with chmod 700 and 600 is replaced", "the permissions stay")
@pytest.mark.usefixtures("exchanges")
def test_the_permissions_of_an_earlier_publication_stay(tmp_path: Path) -> None:
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


@pytest.mark.attempt("F11", "a directory takes DIR/NAME before the exchange", "not published, and it stays")
@pytest.mark.parametrize("change", OTHERS)
@pytest.mark.usefixtures("exchanges")
def test_what_is_not_the_checked_model_goes_back(tmp_path: Path, change: str) -> None:
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
@pytest.mark.parametrize("exchanges", ["no exchange"], indirect=True)
@pytest.mark.usefixtures("exchanges")
def test_an_error_between_renames_puts_the_earlier_model_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = earlier(tmp_path)
    partial = filled(tmp_path)
    real = Path.rename

    def fail(source: Path, target: Path) -> Path:
        if source == partial.model:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(source, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match=r"."):
        partial.publish(replaces=before)
    partial.remove()
    assert names(tmp_path) == {"one"}
    assert directory_identity(tmp_path / "one")[1:] == before[1:]


def killed_between(place: Path, when: str) -> None:
    """Kill a program next to the second rename of an exchange, on a file system that can only rename."""
    killed(
        place,
        f"""def killed(source, target):
    if source == made.model and {when!r} == "before": kill()
    renamed = rename(source, target)
    return kill() if source == made.model else renamed""",
        "Path.rename, partial.renameat2 = killed, lambda *_: False",
        'made.publish(replaces=directory_identity(place / "one"))',
    )


@pytest.mark.attempt("F05", "without exchange: kill -9 between two renames", "the earlier model is put back")
@pytest.mark.parametrize("by", ["the same name", "another name"])
def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path, by: str) -> None:
    before = earlier(tmp_path)
    killed_between(tmp_path, "before")
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
    killed_between(tmp_path, "before")
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


@pytest.mark.attempt("F04b", "kill -9 right after the exchange, without a user's file", "the leftover is removed")
def test_a_kill_before_the_look_leaves_a_model_to_remove(tmp_path: Path) -> None:
    published.publish(tmp_path / "one")
    killed_before_a_look(tmp_path)
    assert names(tmp_path / ".one.partial" / "model") > {"model.safetensors", "config.json"}
    remove_leftovers(tmp_path)
    assert names(tmp_path) == {"one"}
    assert names(tmp_path / "one") == {"model.safetensors"}


@pytest.mark.attempt("F11c", "a user's file comes in before the exchange, and kill -9 after it", "no run removes it")
@pytest.mark.attempt("Y63", "a user edits weights before the exchange, and kill -9 after it", "no run removes it")
@pytest.mark.parametrize("name", ["precious.txt", "model.safetensors"])
def test_a_kill_before_the_look_loses_nothing(tmp_path: Path, name: str) -> None:
    published.publish(tmp_path / "one")
    mine = b"x" * len(published.FILES["model.safetensors"])
    killed_before_a_look(tmp_path, f"(place / 'one' / {name!r}).write_bytes({mine!r})")
    remove_leftovers(tmp_path)
    with pytest.raises(NotPublishedError):
        PartialDirectory(tmp_path / "one")
    assert (tmp_path / ".one.partial" / "model" / name).read_bytes() == mine


@pytest.mark.attempt("F05c", "without exchange: kill -9 after the second rename", "the new model, and no leftover")
def test_a_kill_after_two_renames_leaves_the_new_model(tmp_path: Path) -> None:
    earlier(tmp_path)
    killed_between(tmp_path, "after")
    assert names(tmp_path) == {"one", ".one.partial"}
    remove_leftovers(tmp_path)
    assert names(tmp_path) == {"one"}
    assert names(tmp_path / "one") == {"model.safetensors"}


@pytest.mark.parametrize("by", ["the same name", "another name"])
@pytest.mark.attempt("F03c", "kill -9 while the weights are written", "the next run removes the leftover")
def test_what_a_killed_run_left_is_removed(tmp_path: Path, by: str) -> None:
    killed(tmp_path, "kill()")
    assert names(tmp_path) == {".one.partial"}
    if by == "the same name":
        partial = PartialDirectory(tmp_path / "one")
        assert names(partial.model) == set()
        partial.remove()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == set()


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
    killed(tmp_path, "kill()")
    with pytest.raises(NotPublishedError):
        PartialDirectory(tmp_path / "one")
    remove_leftovers(tmp_path)
    assert names(tmp_path / ".one.partial" / "model") == {"model.safetensors"}


def test_an_error_while_it_is_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "touch", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        PartialDirectory(tmp_path / "one")
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == set()


def test_a_second_removal_leaves_what_another_run_writes(tmp_path: Path) -> None:
    first = filled(tmp_path)
    first.publish(replaces=None)
    (tmp_path / "one").rename(tmp_path / "old")
    second = filled(tmp_path)
    first.remove()
    assert names(second.model) == {"model.safetensors"}
    second.publish(replaces=None)
    assert names(tmp_path) == {"old", "one"}


def test_the_directory_of_another_run_is_not_removed(tmp_path: Path) -> None:
    """A user moves the partial directory away, and a second run makes a new one."""
    first = filled(tmp_path)
    (tmp_path / ".one.partial").rename(tmp_path / "moved")
    second = filled(tmp_path)
    first.remove()
    assert names(second.model) == {"model.safetensors"}
    second.remove()
    assert names(tmp_path) == {"moved"}


def test_what_cannot_be_removed_keeps_its_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = filled(tmp_path)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    partial.remove()
    with pytest.raises(FileExistsError):
        PartialDirectory(tmp_path / "one")
    assert names(tmp_path / ".one.partial") == {"model", "written-by-merge-gate"}
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == set()


def test_without_its_marker_nothing_is_removed(tmp_path: Path, wording: Wording) -> None:
    model = filled(tmp_path).model
    (tmp_path / ".one.partial" / "written-by-merge-gate").unlink()
    remove_leftovers(tmp_path)
    with pytest.raises(NotPublishedError) as caught:
        PartialDirectory(tmp_path / "one")
    wording(str(caught.value))
    assert names(model) == {"model.safetensors"}


def test_the_parent_that_another_run_removed_is_made_again(tmp_path: Path) -> None:
    filled(tmp_path / "merged").publish(replaces=None)
    assert names(tmp_path / "merged") == {"one"}


@pytest.mark.parametrize("publishers", [2, 3])
def test_publishers_of_one_name_lose_nothing(tmp_path: Path, publishers: int) -> None:
    """Each waits for the lock, and removes its directory twice, as a run does, while the next one writes."""
    one = tmp_path / "one"

    def locked() -> PartialDirectory:
        while True:
            with contextlib.suppress(NotPublishedError):
                return PartialDirectory(one)
            time.sleep(0.0005)

    def publish_once(number: int) -> None:
        partial = locked()
        for part in range(3):
            (partial.model / f"{part}").write_bytes(bytes([number]))
            time.sleep(0.001)
        partial.publish(replaces=directory_identity(one) if one.is_dir() else None)
        time.sleep(0.001)
        partial.remove()

    with ThreadPoolExecutor(publishers) as pool:
        for _ in range(50):
            assert list(pool.map(publish_once, range(publishers))) == [None] * publishers
            assert names(tmp_path) == {"one"}
            assert names(one) == {"0", "1", "2"}
            assert len({path.read_bytes() for path in one.iterdir()}) == 1


def test_a_file_in_the_place_of_the_model_is_removed(tmp_path: Path) -> None:
    killed(tmp_path, "shutil.rmtree(made.model); made.model.touch(); kill()")
    filled(tmp_path).remove()
    assert names(tmp_path) == set()


def test_a_flag_that_the_system_does_not_know(tmp_path: Path) -> None:
    assert partial_module.renameat2(tmp_path, tmp_path / "other", 1 << 20) is False
    with pytest.raises(FileNotFoundError):
        partial_module.renameat2(tmp_path / "absent", tmp_path / "other", 1)


# --- whole runs that are killed or interrupted: real processes, with a played worker ---------------------------------

KILLS = 20
ROWS = 50_000


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> KilledRuns:
    place = tmp_path_factory.mktemp("kills")
    lay(place, rows=ROWS)
    return KilledRuns(place, random.Random(28))


@pytest.mark.nightly
@pytest.mark.attempt("F03", "kill -9 at 20 moments of publishing", "only whole models have names")
def test_after_kills_only_whole_models_have_names(runs: KilledRuns) -> None:
    outcomes = [runs.kill_once() for _ in range(KILLS)]
    assert outcomes.count("killed") >= KILLS // 2
    runs.finish()


@pytest.mark.nightly
@pytest.mark.parametrize("publishers", [2, 3])
def test_whole_runs_that_publish_one_name_lose_nothing(runs: KilledRuns, publishers: int) -> None:
    """`make publish-kills` has 50 rounds of each."""
    for number in range(4):
        runs.race(publishers, kills=bool(number % 2))
    runs.finish()


@pytest.mark.nightly
@pytest.mark.attempt("F04", "kill -9 of whole runs, and then an undisturbed one", "whole models, and no leftover")
def test_kills_of_whole_runs_leave_whole_models_only(tmp_path: Path) -> None:
    adapters = lay_real(tmp_path / "place")
    real = KilledRuns(tmp_path / "place", random.Random(1), adapters)
    for _ in range(3):
        real.kill_once()
    real.finish()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.attempt("F03b", "SIGINT, SIGTERM, SIGHUP, or SIGKILL while publishing", "no model has a name")
def test_an_interrupted_run_leaves_no_name(runs: KilledRuns, number: signal.Signals) -> None:
    """The next run removes what SIGKILL leaves."""
    shutil.rmtree(runs.target, ignore_errors=True)
    process, is_killed = runs.start(), number is signal.SIGKILL
    runs.wait_for_partial(process)
    process.send_signal(number)
    assert process.wait() != 0
    assert (process.returncode == -signal.SIGKILL) is is_killed
    assert (runs.named(), bool(runs.partials())) == ([], is_killed)
    if is_killed:
        runs.finish()


@pytest.mark.attempt("F01", "ENOSPC while the model is written", "not published, and no leftover")
@pytest.mark.attempt("F02", "ENOSPC in a write", "an error, and nothing has a name")
@pytest.mark.attempt("F12b", "the disk fills up", "not published, and no leftover")
def test_a_disk_that_fills_up_leaves_nothing(runs: KilledRuns) -> None:
    """A limit on the size of files stands for the disk: the weights do not fit, and the report does."""
    shutil.rmtree(runs.target, ignore_errors=True)
    process = runs.start("bash", "-c", 'ulimit -f 500; exec "$@"', "bash")
    assert process.wait() == 3, (runs.place / "log").read_text()
    assert (runs.named(), runs.partials()) == ([], [])
    report = json.loads((runs.place / "merge-gate-report" / "report.json").read_text())
    assert {adapter["cause"] for adapter in report["adapters"]} == {"not-published"}
    runs.check()
