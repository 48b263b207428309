"""Files and directories: only regular ones are opened, written whole or not at all, and held by one process."""

import errno
import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from merge_gate._internal.locked_directory import AlreadyLockedError, locked_directory
from merge_gate._internal.regular_file import (
    NotRegularFileError,
    TooLargeFileError,
    open_regular_file,
    read_regular_file,
)
from merge_gate._internal.whole_file import whole_file
from tests.support.wording import Wording


def plant_link(path: Path) -> None:
    path.with_name("real").write_bytes(b"12345")
    path.symlink_to("real")


def plant_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize(
    ("plant", "follow"),
    [
        pytest.param(plant_link, False, id="link"),
        pytest.param(Path.mkdir, False, id="directory"),
        pytest.param(os.mkfifo, False, id="pipe"),
        pytest.param(plant_socket, False, id="socket"),
        pytest.param(lambda path: path.symlink_to("/dev/null"), True, id="device"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path, plant, follow, wording) -> None:
    plant(tmp_path / "file")
    with wording.of(NotRegularFileError) as caught:
        open_regular_file(tmp_path / "file", follow=follow)
    assert caught.value.kind in str(caught.value)


def test_a_link_is_followed_on_request(tmp_path: Path) -> None:
    plant_link(tmp_path / "file")
    with open_regular_file(tmp_path / "file", follow=True) as file:
        assert file.read() == b"12345"


@pytest.mark.parametrize(("plant", "number"), [(plant_link, errno.ELOOP), (os.mkfifo, errno.EINVAL)])
def test_a_file_replaced_between_look_and_opening_is_refused(tmp_path, plant, number, monkeypatch) -> None:
    path, look = tmp_path / "file", os.stat
    path.write_bytes(b"12345")

    def look_and_replace(*args: object, **options: object) -> os.stat_result:
        found = look(*args, **options)
        monkeypatch.undo()
        path.unlink()
        plant(path)
        return found

    monkeypatch.setattr(os, "stat", look_and_replace)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OSError) as caught:
        open_regular_file(path)
    assert caught.value.errno == number
    assert len(list(Path("/proc/self/fd").iterdir())) == before, "nothing stays open"


def test_a_name_in_an_open_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        assert read_regular_file("file", 5, folder=folder) == b"12345"
    finally:
        os.close(folder)


def test_a_reader_takes_no_more_than_its_limit(tmp_path: Path, wording: Wording) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular_file(tmp_path / "file", 5) == b"12345"
    with wording.of(TooLargeFileError):
        read_regular_file(tmp_path / "file", 4)


def test_a_file_that_grows_while_it_is_read_is_refused(wording: Wording) -> None:
    """Files of /proc have no size before they are read."""
    with wording.of(TooLargeFileError):
        read_regular_file(Path("/proc/self/status"), 10)


@pytest.mark.parametrize("lasts", [True, False])
def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path, lasts: bool) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(b"old")
    with whole_file(path, lasts=lasts) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        (other,) = set(tmp_path.iterdir()) - {path}
        assert other.name.startswith(".report.json.")
        assert other.suffix == ".tmp"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_whatever_is_raised_the_old_file_stays_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(b"old")

    def stop_halfway() -> None:
        with whole_file(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        stop_halfway()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_at_its_name_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"theirs")
    (tmp_path / "report.json").symlink_to("elsewhere")
    with whole_file(tmp_path / "report.json") as file:
        file.write(b"ours")
    assert (tmp_path / "elsewhere").read_bytes() == b"theirs"
    assert not (tmp_path / "report.json").is_symlink()


def test_a_folder_that_is_held_open_gets_the_file_wherever_it_is(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    folder = os.open(tmp_path / "folder", os.O_RDONLY)
    (tmp_path / "folder").rename(tmp_path / "moved")
    try:
        with whole_file(Path("name"), folder=folder) as file:
            file.write(b"here")
        with pytest.raises(IsADirectoryError), whole_file(Path("x"), folder=folder):
            (tmp_path / "moved" / "x").mkdir()
    finally:
        os.close(folder)
    assert (tmp_path / "moved" / "name").read_bytes() == b"here"
    assert sorted(path.name for path in (tmp_path / "moved").iterdir()) == ["name", "x"]


def test_a_file_that_finds_no_room_is_not_there(tmp_path: Path) -> None:
    """The system refuses the write when the buffer is emptied, after the block's last line."""
    code = (
        "import sys; from pathlib import Path; from merge_gate._internal.whole_file import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as file: file.write(bytes(5000))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "report.json")],
        check=False,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


HOLD = (
    "import sys; from merge_gate._internal.locked_directory import locked_directory\n"
    "with locked_directory(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
)


def test_the_lock_ends_with_its_process_and_leaves_no_file(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(AlreadyLockedError), locked_directory(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
    with locked_directory(tmp_path) as lock:
        assert lock.is_held
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked_directory(tmp_path) as lock:
        assert not lock.is_held
        assert os.path.samestat(os.fstat(lock.descriptor), tmp_path.stat())


def test_what_is_no_directory_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("pipe", "link", "absent"):
        refused = pytest.raises(OSError, match=r"Not a directory|symbolic links|No such file")
        with refused, locked_directory(tmp_path / name, follow=False):
            pass
    with locked_directory(tmp_path / "link") as lock:
        assert lock.is_held
