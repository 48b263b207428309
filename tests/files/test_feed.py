"""Files that are read in pieces, or as a JSON object, and whatever a hostile directory holds in their place."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from merge_gate._internal.errors import SourceError
from merge_gate.files.feed import PIECE_BYTES, Feed, LocalFeed
from merge_gate.files.json_object import read_as_transformers

CONTENT = bytes(range(256)) * 64


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "one.safetensors").write_bytes(CONTENT)
    return tmp_path


@pytest.mark.parametrize("keep", [True, False])
def test_a_read_has_exactly_the_bytes(directory: Path, keep: bool) -> None:
    content = CONTENT * (2 * PIECE_BYTES // len(CONTENT) + 1)
    (directory / "part" / "one.safetensors").write_bytes(content)
    buffers = [bytearray(size) for size in (0, 1, PIECE_BYTES, 2 * PIECE_BYTES + 1)]
    with LocalFeed(str(directory), keep=keep) as local:
        feed: Feed = local
        feed.expect((), whole=True)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda one: feed.read("part/one.safetensors", 17, memoryview(one)), buffers))
    assert [bytes(one) for one in buffers] == [content[17 : 17 + len(one)] for one in buffers]


def test_a_file_that_ends_too_early_is_an_error(directory: Path) -> None:
    with LocalFeed(str(directory)) as feed:
        feed.read("part/one.safetensors", 0, memoryview(bytearray(10)))
        os.truncate(directory / "part" / "one.safetensors", 15)
        with pytest.raises(SourceError) as caught:
            feed.read("part/one.safetensors", 10, memoryview(bytearray(10)))
    assert all(part in caught.value.message for part in ("one.safetensors", "expected 10 bytes", "got 5"))
    assert caught.value.hint


def test_a_file_that_is_not_there_is_an_error(directory: Path) -> None:
    with LocalFeed(str(directory)) as feed, pytest.raises(SourceError, match="No such file"):
        feed.read("other.safetensors", 0, memoryview(bytearray(1)))


def test_closing_closes_the_files(directory: Path) -> None:
    before = set(Path("/proc/self/fd").iterdir())
    with LocalFeed(str(directory)) as feed:
        feed.read("part/one.safetensors", 0, memoryview(bytearray(1)))
        assert set(Path("/proc/self/fd").iterdir()) - before
    assert len(list(Path("/proc/self/fd").iterdir())) <= len(before)


def test_what_transformers_accepts_is_read(tmp_path: Path) -> None:
    file = tmp_path / "blob"
    file.write_text('{"a": NaN, "b": 1, "b": 2}')
    (tmp_path / "config.json").symlink_to(file)
    value = read_as_transformers(tmp_path / "config.json")
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
