"""A file of unknown origin: only a regular one is opened, links only on request, and reading has a limit."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from merge_gate._internal.regular_file import (
    NotRegularFileError,
    TooLargeFileError,
    open_regular_file,
    read_regular_file,
)
from tests.support.wording import Wording

if TYPE_CHECKING:
    from collections.abc import Callable


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
def test_other_kinds_are_refused_by_name(
    tmp_path: Path, plant: Callable[[Path], None], follow: bool, wording: Wording
) -> None:
    plant(tmp_path / "file")
    with pytest.raises(NotRegularFileError) as caught:
        open_regular_file(tmp_path / "file", follow=follow)
    wording(caught.value)
    assert caught.value.kind in str(caught.value)


def test_a_link_is_followed_on_request(tmp_path: Path) -> None:
    plant_link(tmp_path / "file")
    with open_regular_file(tmp_path / "file", follow=True) as file:
        assert file.read() == b"12345"


@pytest.mark.parametrize(("plant", "number"), [(plant_link, errno.ELOOP), (os.mkfifo, errno.EINVAL)])
def test_a_file_replaced_between_look_and_opening_is_refused(
    tmp_path: Path, plant: Callable[[Path], None], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    with pytest.raises(TooLargeFileError) as caught:
        read_regular_file(tmp_path / "file", 4)
    wording(caught.value)


def test_a_file_that_grows_while_it_is_read_is_refused(wording: Wording) -> None:
    """Files of /proc have no size before they are read."""
    with pytest.raises(TooLargeFileError) as caught:
        read_regular_file(Path("/proc/self/status"), 10)
    wording(caught.value)
