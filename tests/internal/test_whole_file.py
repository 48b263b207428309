"""A file that is written whole or not at all: what is there after a success, an error and a full disk."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from merge_gate._internal.whole_file import whole_file


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
