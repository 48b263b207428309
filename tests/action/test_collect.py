"""What foreign code leaves in place of a report stays where it is. The real containers are in tests/e2e."""

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from merge_gate.action.docker import collect
from merge_gate.report.stored.report_files import FORMATS


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "secret").write_text("of the host", encoding="utf-8")
    return tmp_path / "source"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


def test_every_format_is_taken() -> None:
    assert set(FORMATS) <= set(collect.MAX_BYTES)


def test_files_of_a_report_are_taken_and_no_others(source: Path, target: Path) -> None:
    for name in ("report.json", "summary.md", "notes.txt", ".hidden", "canary-1"):
        (source / name).write_text(f"text of {name}", encoding="utf-8")
    (source / "folder").mkdir()
    assert collect.take(source, target) == []
    assert {path.name: path.read_text() for path in target.iterdir()} == {
        "report.json": "text of report.json",
        "summary.md": "text of summary.md",
    }
    assert collect.files(target) == [target / "report.json", target / "summary.md"]


def plant_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


PLANTED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link": (lambda path: path.symlink_to("../secret"), "a symbolic link"),
    "an endless link": (lambda path: path.symlink_to("/dev/zero"), "a symbolic link"),
    "a link to a folder": (lambda path: path.symlink_to(".."), "a symbolic link"),
    "a pipe": (os.mkfifo, "a named pipe"),
    "a sparse file": (lambda path: (path.touch(), os.truncate(path, 4 << 30)), "4294967296 bytes"),
    "a folder": (Path.mkdir, "a directory"),
    "a socket": (plant_socket, "a socket"),
}


@pytest.mark.parametrize("what", PLANTED)
@pytest.mark.parametrize("name", ["report.json", "summary.md"])
def test_what_is_no_file_is_refused_in_a_sentence(source: Path, target: Path, name: str, what: str) -> None:
    plant, says = PLANTED[what]
    plant(source / name)
    (sentence,) = collect.take(source, target)
    assert sentence.startswith(f"{name} ")
    assert says in sentence
    assert list(target.iterdir()) == [], "neither the file nor a part of it"


def test_a_source_that_is_a_link_is_not_followed(source: Path, target: Path, tmp_path: Path) -> None:
    (source / "report.json").write_text("{}", encoding="utf-8")
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(OSError, match=r"Not a directory|symbolic"):
        collect.take(tmp_path / "link", target)


def test_a_link_at_the_target_is_replaced_and_not_followed(source: Path, target: Path, tmp_path: Path) -> None:
    """A checkout may hold a link under the report's name."""
    (source / "report.json").write_text("{}", encoding="utf-8")
    (target / "report.json").symlink_to(tmp_path / "secret")
    assert collect.take(source, target) == []
    assert (tmp_path / "secret").read_text() == "of the host"
    assert not (target / "report.json").is_symlink()


def test_a_directory_made_to_stay_goes(tmp_path: Path) -> None:
    """Thousands of levels, and folders that nobody may enter."""
    folder = tmp_path / "made"
    folder.mkdir()
    (tmp_path / "secret").write_text("x", encoding="utf-8")
    (folder / "link").symlink_to(tmp_path)
    (folder / "closed" / "inner").mkdir(parents=True)
    (folder / "closed").chmod(0)
    with contextlib.chdir(folder):
        for _ in range(3000):
            Path("d").mkdir()
            os.chdir("d")
    collect.remove_tree(folder)
    assert not folder.exists()
    assert (tmp_path / "secret").exists()
