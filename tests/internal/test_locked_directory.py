"""A directory that one process holds at a time, also after that process was killed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from merge_gate._internal import locked_directory as module
from merge_gate._internal.locked_directory import AlreadyLockedError, locked_directory

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

    monkeypatch.setattr(module.fcntl, "flock", refuse)
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
