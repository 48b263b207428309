"""The weight files of a published model.

The layout has the base's own bytes where nothing changes, and true headers and index elsewhere. The writer accounts for
every tensor, and passes nothing that the disk has otherwise.
"""

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from merge_gate._internal.errors import NotPublishedError
from merge_gate.features.publish.planned_files import PlannedFiles
from merge_gate.features.publish.weight_files import (
    FileLayout,
    ModelLayout,
    ModelWriter,
    Place,
    base_layout,
    cast,
    merged_layout,
    refuse_other_files,
)
from merge_gate.records.files import StoredTensor
from tests.support.played_merges import Shapes, lay_base

SHARDS = ["steps", "embed.weight", "norm.weight", "layer.weight", "mtp.weight"]
FILES: dict[str, Shapes] = {
    "model-00001-of-00002.safetensors": {
        "steps": ("I64", (3,)),
        "embed.weight": ("BF16", (10, 4)),
        "norm.weight": ("BF16", (5,)),
    },
    "model-00002-of-00002.safetensors": {"layer.weight": ("BF16", (4, 4)), "mtp.weight": ("BF16", (4, 4))},
}
"""Of these tensors, transformers would not load the last one."""


@pytest.fixture
def base(tmp_path: Path) -> ModelLayout:
    lay_base(tmp_path, FILES)
    return base_layout(str(tmp_path))


def changed(name: str, dtype: str, *shape: int) -> dict[str, StoredTensor]:
    return {name: StoredTensor(name=name, dtype=dtype, shape=shape)}


def test_without_changes_every_byte_of_headers_and_index_stays(base: ModelLayout, tmp_path: Path) -> None:
    assert merged_layout(base, {}) == base
    assert base.size_bytes == sum(path.stat().st_size for path in tmp_path.glob("model*"))


def test_a_changed_shape_gives_its_file_alone_a_new_header(base: ModelLayout) -> None:
    layout = merged_layout(base, changed("embed.weight", "BF16", 12, 4))
    assert layout.files[1] == base.files[1]
    assert layout.files[0].head != base.files[0].head
    header = json.loads(layout.files[0].head[8:])
    assert header["__metadata__"] == {"format": "pt"}
    assert header["embed.weight"]["shape"] == [12, 4]
    assert len(layout.files[0].head) % 8 == 0
    assert json.loads(layout.index.head)["metadata"]["total_size"] == layout.size_bytes - sum(
        len(file.head) for file in layout.files
    ) - len(layout.index.head)


def test_wider_dtypes_come_first_in_a_new_file(base: ModelLayout) -> None:
    layout = merged_layout(base, changed("embed.weight", "BF16", 9, 3))
    widths = [{"F32": 4, "BF16": 2, "I64": 8}[place.tensor.dtype] for place in layout.files[0].places]
    assert widths == sorted(widths, reverse=True)
    data = len(layout.files[0].head)
    assert all((place.start - data) % width == 0 for place, width in zip(layout.files[0].places, widths, strict=True))


def test_a_tensor_that_the_base_lacks_is_in_the_last_file(base: ModelLayout) -> None:
    layout = merged_layout(base, changed("score.weight", "F32", 2, 4))
    assert layout.files[-1].places[0].tensor.name == "score.weight"
    assert json.loads(layout.index.head)["weight_map"]["score.weight"] == layout.files[-1].name


def test_a_cast_changes_floating_tensors_only(base: ModelLayout) -> None:
    layout = merged_layout(base, cast(base, "float32"))
    assert {tensor.name: tensor.dtype for tensor in layout.tensors} == {
        "steps": "I64",
        "embed.weight": "F32",
        "norm.weight": "F32",
        "layer.weight": "F32",
        "mtp.weight": "F32",
    }


@pytest.mark.parametrize(("limit", "files"), [(1, 5), (100, 3), (10_000, 1)])
@pytest.mark.attempt("P13", "--max-shard-size of one byte and others", "one tensor in each file")
def test_shards_have_at_most_the_limit_or_one_tensor(base: ModelLayout, limit: int, files: int) -> None:
    layout = merged_layout(base, {}, limit)
    assert len(layout.files) == files
    for file in layout.files:
        assert len(file.places) == 1 or sum(place.size_bytes for place in file.places) <= limit
    assert [t.name for t in layout.tensors] == sorted((t.name for t in layout.tensors), key=SHARDS.index) or files < 5
    assert {t.name for t in layout.tensors} == {t.name for t in base.tensors}
    assert (layout.index is None) == (files == 1)
    assert layout.files[0].name == ("model.safetensors" if files == 1 else f"model-00001-of-{files:05}.safetensors")


def test_a_base_with_its_own_name_for_one_file_is_not_cut(tmp_path: Path) -> None:
    lay_base(tmp_path, {"own.safetensors": {"a": ("F32", (4,)), "b": ("F32", (4,))}})
    (tmp_path / "config.json").write_text('{"transformers_weights": "own.safetensors"}')
    base = base_layout(str(tmp_path))
    assert merged_layout(base, {}, 100).files[0].name == "own.safetensors"
    with pytest.raises(NotPublishedError):
        merged_layout(base, {}, 1)


def test_an_index_with_ghosts_or_gaps_is_made_again(tmp_path: Path) -> None:
    lay_base(tmp_path, FILES)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = index["weight_map"].pop("mtp.weight")
    path.write_text(json.dumps(index))
    layout = merged_layout(base_layout(str(tmp_path)), {})
    listed = json.loads(layout.index.head)["weight_map"]
    assert set(listed) == {tensor.name for tensor in layout.tensors}


@pytest.mark.parametrize("names", [(), ("config.json", "pytorch_model.bin")])
def test_a_base_without_safetensors_is_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(NotPublishedError):
        base_layout(str(tmp_path))


def test_a_model_is_refused_if_other_files_of_it_would_be_loaded(base: ModelLayout, tmp_path: Path) -> None:
    refuse_other_files(tmp_path, base)
    with pytest.raises(NotPublishedError):
        refuse_other_files(tmp_path, merged_layout(base, {}, 1))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(NotPublishedError):
        refuse_other_files(tmp_path, base)


def test_elements_that_fill_no_whole_byte_are_refused(base: ModelLayout) -> None:
    with pytest.raises(NotPublishedError):
        merged_layout(base, changed("embed.weight", "F4", 3))


def test_a_header_or_index_that_cannot_be_parsed_has_no_metadata() -> None:
    """Both were read before; what is made of them is complete all the same."""
    tensor = StoredTensor(name="a", dtype="F32", shape=(1,), file="a.safetensors")
    file = FileLayout(name="a.safetensors", head=bytes(8) + b"x", places=(Place(tensor=tensor, start=9, end=13),))
    layout = ModelLayout(files=(file,), index=FileLayout(name="a.safetensors.index.json", head=b"x"))
    made = merged_layout(layout, changed("a", "F32", 2))
    assert b"__metadata__" not in made.files[0].head
    assert json.loads(made.index.head) == {"metadata": {"total_size": 8}, "weight_map": {"a": "a.safetensors"}}


# --- written, and read back ------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> dict[str, bytes]:
    (tmp_path / "base").mkdir()
    (tmp_path / "model").mkdir()
    return lay_base(tmp_path / "base", FILES)


def new_writer(place: Path, layout: ModelLayout | None = None) -> ModelWriter:
    return ModelWriter(place / "model", layout or base_layout(str(place / "base")))


def write(writer: ModelWriter, tensors: Mapping[str, bytes]) -> None:
    """Write tensors as a worker does, each in two parts."""
    with contextlib.closing(PlannedFiles(writer.make_files())) as files:
        for name, content in tensors.items():
            middle = len(content) // 2
            files.write(name, 0, memoryview(content)[:middle])
            assert files.lacks(name)
            files.write(name, middle, memoryview(content)[middle:])
            assert not files.lacks(name)
        assert not files.lacks("unknown")
        writer.checksums = files.checksums


def test_the_bytes_of_the_base_give_its_files(written: dict[str, bytes], tmp_path: Path) -> None:
    writer = new_writer(tmp_path)
    write(writer, written)
    assert list(writer.missing()) == []
    for record in writer.read_back():
        own = (tmp_path / "base" / record.path).read_bytes()
        assert (tmp_path / "model" / record.path).read_bytes() == own
        assert (record.size_bytes, record.sha256) == (len(own), hashlib.sha256(own).hexdigest())


def test_what_was_not_written_is_copied(written: dict[str, bytes], tmp_path: Path) -> None:
    writer = new_writer(tmp_path)
    write(writer, {"layer.weight": bytes(32)})
    assert {place.tensor.name for place in writer.missing()} == written.keys() - {"layer.weight"}
    writer.copy(base_layout(str(tmp_path / "base")), str(tmp_path / "base"))
    assert list(writer.missing()) == []
    writer.read_back()
    first = writer.layout.files[0].name
    assert (tmp_path / "model" / first).read_bytes() == (tmp_path / "base" / first).read_bytes()


def test_what_is_written_again_replaces_what_was_there(written: dict[str, bytes], tmp_path: Path) -> None:
    writer, content = new_writer(tmp_path), memoryview(written["layer.weight"])
    with contextlib.closing(PlannedFiles(writer.make_files())) as files:
        files.write("layer.weight", 0, memoryview(bytes(32)))
        files.write("layer.weight", 0, content[:8])
        assert "layer.weight" not in files.checksums
        files.write("layer.weight", 8, content[8:])
        assert files.checksums == {"layer.weight": zlib.crc32(content)}


@pytest.mark.parametrize("place", [3, -1, "short", "long"])
@pytest.mark.attempt("F02b", "the disk gives other bytes back", "not published")
def test_a_disk_with_other_bytes_is_found(written: dict[str, bytes], tmp_path: Path, place: int | str) -> None:
    writer = new_writer(tmp_path)
    write(writer, written)
    path = tmp_path / "model" / "model-00001-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    if isinstance(place, int):
        content[place] ^= 1
    path.write_bytes(content[:-1] if place == "short" else bytes(content) + b"x" if place == "long" else content)
    with pytest.raises(NotPublishedError):
        writer.read_back()


def test_other_files_are_written_once_and_read_back(written: dict[str, bytes], tmp_path: Path) -> None:
    writer = new_writer(tmp_path)
    record = writer.add_file("sub/config.json", b"{}")
    assert (record.path, record.size_bytes, record.sha256) == ("sub/config.json", 2, hashlib.sha256(b"{}").hexdigest())
    assert (tmp_path / "model" / "sub" / "config.json").read_bytes() == b"{}"
    with pytest.raises(FileExistsError):
        writer.add_file("sub/config.json", b"[]")
    (tmp_path / "model" / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        writer.add_file("link", b"{}")


def test_a_file_without_tensors_is_written(tmp_path: Path) -> None:
    header = b"{}      "
    layout = ModelLayout(files=(FileLayout(name="a.safetensors", head=(8).to_bytes(8, "little") + header, places=()),))
    writer = ModelWriter(tmp_path, layout)
    write(writer, {})
    (record,) = writer.read_back()
    assert record.size_bytes == 16


def test_another_file_that_the_disk_has_otherwise_is_found(
    written: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.pwrite(descriptor, b"x", 0))
    with pytest.raises(NotPublishedError):
        new_writer(tmp_path).add_file("config.json", b"{}")


def test_a_name_in_two_files_is_written_to_both(written: dict[str, bytes], tmp_path: Path) -> None:
    layout = base_layout(str(tmp_path / "base"))
    first = layout.files[0]
    again = replace(
        first, name="again.safetensors", places=tuple(in_file(place, "again.safetensors") for place in first.places)
    )
    writer = new_writer(tmp_path, ModelLayout(files=(*layout.files, again)))
    write(writer, {name: content for name, content in written.items() if name != "steps"})
    writer.copy(layout, str(tmp_path / "base"))
    writer.read_back()
    one, again_written = (tmp_path / "model" / name for name in (first.name, "again.safetensors"))
    assert again_written.read_bytes() == one.read_bytes() == (tmp_path / "base" / first.name).read_bytes()


def in_file(place: Place, file: str) -> Place:
    return replace(place, tensor=replace(place.tensor, file=file))
