"""A JSON file that transformers reads: its object, or None for whatever a hostile directory holds in its place."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from merge_gate.files.json_object import read_as_transformers

if TYPE_CHECKING:
    from pathlib import Path


def test_what_transformers_accepts_is_read(tmp_path: Path) -> None:
    file = tmp_path / "blob"
    file.write_text('{"a": NaN, "b": 1, "b": 2}')
    (tmp_path / "config.json").symlink_to(file)
    value = read_as_transformers(tmp_path / "config.json")
    assert value is not None
    assert value["b"] == 2


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b'{"a"', b"\xff\xfe\xfd", b"[" * 100_000, b'{"n": %s}' % (b"9" * 9_999)]
)
def test_what_is_no_object_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert read_as_transformers(tmp_path / "config.json") is None


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"a": 1}')
    assert read_as_transformers(tmp_path / "config.json", max_bytes=8) == {"a": 1}
    assert read_as_transformers(tmp_path / "config.json", max_bytes=7) is None


def test_no_writer_of_a_pipe_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    assert read_as_transformers(tmp_path / "config.json") is None
    assert read_as_transformers(tmp_path) is None
    assert read_as_transformers(tmp_path / "none") is None
    assert read_as_transformers("/dev/zero") is None
    assert read_as_transformers("nul\0byte") is None
