"""The layout of a published model: the base's own bytes where nothing changes, true headers and index elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from merge_gate.errors import NotPublishedError
from merge_gate.publish.layout import (
    FileLayout,
    ModelLayout,
    Place,
    base_layout,
    cast,
    compare_written,
    merged_layout,
)
from merge_gate.records.files import StoredTensor
from tests.support.publish import SHARDS, lay_base, lay_shards


@pytest.fixture
def base(tmp_path: Path) -> ModelLayout:
    lay_shards(tmp_path)
    return base_layout(str(tmp_path))


def changed(name: str, dtype: str, *shape: int) -> dict[str, StoredTensor]:
    return {name: StoredTensor(name=name, dtype=dtype, shape=shape)}


def test_without_changes_every_byte_of_headers_and_index_stays(base: ModelLayout, tmp_path: Path) -> None:
    assert merged_layout(base, {}) == base
    assert base.size_bytes == sum(path.stat().st_size for path in tmp_path.glob("model*"))


def test_a_changed_shape_gives_its_file_a_new_header_and_leaves_the_others(base: ModelLayout) -> None:
    layout = merged_layout(base, changed("embed.weight", "BF16", 12, 4))
    assert layout.files[1] == base.files[1]
    assert layout.files[0].head != base.files[0].head
    header = json.loads(layout.files[0].head[8:])
    assert header["__metadata__"] == {"format": "pt"}
    assert header["embed.weight"]["shape"] == [12, 4]
    assert len(layout.files[0].head) % 8 == 0
    assert layout.index is not None
    assert json.loads(layout.index.head)["metadata"]["total_size"] == layout.size_bytes - sum(
        len(file.head) for file in layout.files
    ) - len(layout.index.head)


def test_wider_dtypes_come_first_in_a_new_file(base: ModelLayout) -> None:
    layout = merged_layout(base, changed("embed.weight", "BF16", 9, 3))
    widths = [{"F32": 4, "BF16": 2, "I64": 8}[place.tensor.dtype] for place in layout.files[0].places]
    assert widths == sorted(widths, reverse=True)
    data = len(layout.files[0].head)
    assert all((place.start - data) % width == 0 for place, width in zip(layout.files[0].places, widths, strict=True))


def test_a_tensor_that_the_base_does_not_store_goes_to_the_last_file(base: ModelLayout) -> None:
    layout = merged_layout(base, changed("score.weight", "F32", 2, 4))
    assert layout.files[-1].places[0].tensor.name == "score.weight"
    assert layout.index is not None
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


def test_an_index_that_names_ghosts_or_omits_tensors_is_made_again(tmp_path: Path) -> None:
    lay_shards(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = index["weight_map"].pop("mtp.weight")
    path.write_text(json.dumps(index))
    layout = merged_layout(base_layout(str(tmp_path)), {})
    assert layout.index is not None
    listed = json.loads(layout.index.head)["weight_map"]
    assert set(listed) == {tensor.name for tensor in layout.tensors}


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(NotPublishedError):
        base_layout(str(tmp_path))


def test_written_files_are_compared_with_the_plan(base: ModelLayout, tmp_path: Path) -> None:
    compare_written(tmp_path, base)
    with pytest.raises(NotPublishedError):
        compare_written(tmp_path, merged_layout(base, changed("embed.weight", "BF16", 12, 4)))
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("mtp.weight", "ghost"))
    with pytest.raises(NotPublishedError):
        compare_written(tmp_path, base)


def test_a_base_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotPublishedError):
        base_layout(str(tmp_path))


def test_elements_that_fill_no_whole_byte_are_refused(base: ModelLayout) -> None:
    with pytest.raises(NotPublishedError):
        merged_layout(base, changed("embed.weight", "F4", 3))


def test_a_header_or_an_index_that_cannot_be_parsed_has_no_metadata() -> None:
    """Both were read before; what is made of them is complete all the same."""
    tensor = StoredTensor(name="a", dtype="F32", shape=(1,), file="a.safetensors")
    file = FileLayout(name="a.safetensors", head=bytes(8) + b"x", places=(Place(tensor=tensor, start=9, end=13),))
    layout = ModelLayout(files=(file,), index=FileLayout(name="a.safetensors.index.json", head=b"x"))
    made = merged_layout(layout, changed("a", "F32", 2))
    assert b"__metadata__" not in made.files[0].head
    assert made.index is not None
    assert json.loads(made.index.head) == {"metadata": {"total_size": 8}, "weight_map": {"a": "a.safetensors"}}
