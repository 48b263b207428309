"""The writer: any order of parts, every byte accounted for, and nothing passes that the disk has otherwise."""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest

from merge_gate.errors import NotPublishedError
from merge_gate.publish import writer as writer_module
from merge_gate.publish.layout import FileLayout, ModelLayout, Place, base_layout
from merge_gate.publish.writer import ModelWriter
from tests.support.publish import lay_shards


@pytest.fixture
def base(tmp_path: Path) -> dict[str, bytes]:
    (tmp_path / "base").mkdir()
    (tmp_path / "model").mkdir()
    return lay_shards(tmp_path / "base")


def new_writer(place: Path) -> ModelWriter:
    return ModelWriter(place / "model", base_layout(str(place / "base")))


def test_the_bytes_of_the_base_give_its_files(base: dict[str, bytes], tmp_path: Path) -> None:
    writer = new_writer(tmp_path)
    for name, content in reversed(base.items()):
        middle = len(content) // 2
        writer.write(name, middle, memoryview(content)[middle:])
        assert name in {place.tensor.name for place in writer.missing()}
        writer.write(name, 0, memoryview(content)[:middle])
    assert list(writer.missing()) == []
    for record in writer.read_back():
        own = (tmp_path / "base" / record.path).read_bytes()
        assert (tmp_path / "model" / record.path).read_bytes() == own
        assert (record.size_bytes, record.sha256) == (len(own), hashlib.sha256(own).hexdigest())


def test_what_is_written_again_replaces_every_part_that_it_overlaps(base: dict[str, bytes], tmp_path: Path) -> None:
    writer = new_writer(tmp_path)
    content = memoryview(base["layer.weight"])
    for start, end in ((0, 8), (8, 32), (4, 12)):
        writer.write("layer.weight", start, content[start:end])
    (place,) = writer.places("layer.weight")
    assert not writer.is_written(place)
    writer.write("layer.weight", 0, content)
    assert writer.is_written(place)
    writer.forget(place)
    assert not writer.is_written(place)


@pytest.mark.parametrize(
    ("name", "offset", "size"), [("unknown", 0, 4), ("embed.weight", 76, 8), ("embed.weight", -4, 4)]
)
def test_bytes_outside_of_the_layout_are_refused(
    base: dict[str, bytes], tmp_path: Path, name: str, offset: int, size: int
) -> None:
    with pytest.raises(ValueError, match=name):
        new_writer(tmp_path).write(name, offset, memoryview(bytes(size)))


@pytest.mark.parametrize("place", [3, -1, "short", "long"])
@pytest.mark.attempt("F02b", "the disk gives other bytes back", "not published")
def test_a_disk_with_other_bytes_is_found(base: dict[str, bytes], tmp_path: Path, place: int | str) -> None:
    writer = new_writer(tmp_path)
    for name, content in base.items():
        writer.write(name, 0, memoryview(content))
    path = tmp_path / "model" / "model-00001-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    if isinstance(place, int):
        content[place] ^= 1
    path.write_bytes(content[:-1] if place == "short" else bytes(content) + b"x" if place == "long" else content)
    with pytest.raises(NotPublishedError):
        writer.read_back()


@pytest.mark.attempt("F02", "ENOSPC in a write", "an error, and nothing has a name")
def test_a_full_disk_is_an_error(base: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = new_writer(tmp_path)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer_module.os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        writer.write("layer.weight", 0, memoryview(base["layer.weight"]))


def test_other_files_are_written_once_and_read_back(base: dict[str, bytes], tmp_path: Path) -> None:
    writer = new_writer(tmp_path)
    record = writer.add_file("sub/config.json", b"{}")
    assert (record.path, record.size_bytes, record.sha256) == ("sub/config.json", 2, hashlib.sha256(b"{}").hexdigest())
    assert (tmp_path / "model" / "sub" / "config.json").read_bytes() == b"{}"
    with pytest.raises(FileExistsError):
        writer.add_file("sub/config.json", b"[]")
    (tmp_path / "model" / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        writer.add_file("link", b"{}")


def test_a_file_that_shrinks_while_it_is_read_is_found(base: dict[str, bytes], tmp_path: Path) -> None:
    writer = new_writer(tmp_path)
    for name, content in base.items():
        writer.write(name, 0, memoryview(content))
    read: list[None] = []

    def cut() -> None:
        read.append(None)
        if len(read) == len(writer.layout.files) + 1:  # the first piece
            os.truncate(tmp_path / "model" / "model-00001-of-00002.safetensors", 8)

    with pytest.raises(NotPublishedError):
        writer.read_back(cut)


def test_a_file_without_tensors_is_written(tmp_path: Path) -> None:
    header = b"{}      "
    layout = ModelLayout(files=(FileLayout(name="a.safetensors", head=(8).to_bytes(8, "little") + header, places=()),))
    (record,) = ModelWriter(tmp_path, layout).read_back()
    assert record.size_bytes == 16


def test_more_parts_than_a_tensor_can_have_are_refused(
    base: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "MOST_PARTS", 1)
    writer = new_writer(tmp_path)
    writer.write("layer.weight", 0, memoryview(bytes(4)))
    with pytest.raises(ValueError, match="parts"):
        writer.write("layer.weight", 4, memoryview(bytes(4)))


def test_another_file_that_the_disk_has_otherwise_is_found(
    base: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_read_whole", lambda *_: b"other")
    with pytest.raises(NotPublishedError):
        new_writer(tmp_path).add_file("config.json", b"{}")


def test_a_name_in_two_files_is_written_to_both(base: dict[str, bytes], tmp_path: Path) -> None:
    layout = base_layout(str(tmp_path / "base"))
    first = layout.files[0]
    again = replace(
        first, name="again.safetensors", places=tuple(in_file(place, "again.safetensors") for place in first.places)
    )
    writer = ModelWriter(tmp_path / "model", ModelLayout(files=(*layout.files, again)))
    for name, content in base.items():
        writer.write(name, 0, memoryview(content))
    assert list(writer.missing()) == []
    written = (tmp_path / "model" / first.name).read_bytes()
    assert (tmp_path / "model" / "again.safetensors").read_bytes() == written


def in_file(place: Place, file: str) -> Place:
    return replace(place, tensor=replace(place.tensor, file=file))
