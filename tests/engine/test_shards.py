"""Which files the numbers of an index imply, and which of them it does not name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from merge_gate.engine.shards import shards_left_out

if TYPE_CHECKING:
    from pathlib import Path

INDEX = "model.safetensors.index.json"


def shard(number: int, of: int = 3) -> str:
    return f"model-{number:05d}-of-{of:05d}.safetensors"


@pytest.mark.parametrize(
    ("named", "left_out"),
    [
        ([shard(1), shard(2), shard(3)], []),
        ([shard(1), shard(3)], [shard(2)]),
        ([shard(1)], [shard(2), shard(3)]),
        (["part-a.safetensors", "part-b.safetensors"], []),
        ([shard(1, 1), "extra.safetensors"], []),
        ([f"shards/{shard(1)}", f"shards/{shard(3)}"], [f"shards/{shard(2)}"]),
        ([shard(0), shard(1), shard(2)], []),
        ([shard(0), shard(2)], [shard(1)]),
        (["model-1-of-2.bin"], ["model-2-of-2.bin"]),
        (["model-1-of-999999999999.bin"], []),
    ],
)
def test_what_the_numbers_imply_is_named_or_left_out(named: list[str], left_out: list[str], tmp_path: Path) -> None:
    weight_map = {f"layers.{number}.weight": name for number, name in enumerate(named)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert shards_left_out(tmp_path) == left_out


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    assert shards_left_out(tmp_path) == []
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": shard(1)}}))
    (tmp_path / "model.safetensors").touch()
    assert shards_left_out(tmp_path) == []
