"""Files that are exchanged or written to under a merge: each way in which other bytes could be certified."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from merge_gate._internal.errors import EngineError
from merge_gate.files.identity import base_identity
from merge_gate.files.preflight import preflight
from merge_gate.records.files import AdapterFiles
from merge_gate.worker import pinned
from merge_gate.worker.pinned import pinned_adapter, pinned_directory, verify_base
from tests.support.wording import Wording

WEIGHTS = "adapter_model.safetensors"
HEADER = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
GOOD = len(HEADER).to_bytes(8, "little") + HEADER + b"\0\0\x80?"
OTHER = GOOD[:-4] + b"\0\0\xc0\x7f"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter" / WEIGHTS).write_bytes(GOOD)
    return tmp_path / "adapter"


def read(directory: Path) -> AdapterFiles:
    return preflight(str(directory), allow_pickle=False)


def replace_file(adapter: Path) -> None:
    (adapter / "new").write_bytes(OTHER)
    (adapter / "new").replace(adapter / WEIGHTS)


def write_in_place(adapter: Path) -> None:
    with (adapter / WEIGHTS).open("r+b") as file:
        file.write(OTHER)


def write_in_place_and_set_the_time_back(adapter: Path) -> None:
    before = (adapter / WEIGHTS).stat()
    write_in_place(adapter)
    os.utime(adapter / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))


def swap_away_and_back(adapter: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / "kept")
    (adapter / WEIGHTS).write_bytes(OTHER)
    (adapter / "kept").replace(adapter / WEIGHTS)


def write_other_bytes_and_the_old_ones_again(adapter: Path) -> None:
    write_in_place(adapter)
    (adapter / WEIGHTS).write_bytes(GOOD)


def take_away(adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()


def put_a_pipe(adapter: Path) -> None:
    take_away(adapter)
    os.mkfifo(adapter / WEIGHTS)


CHANGES = (
    replace_file,
    write_in_place,
    write_in_place_and_set_the_time_back,
    swap_away_and_back,
    write_other_bytes_and_the_old_ones_again,
    take_away,
    put_a_pipe,
)


def test_what_does_not_change_is_read_through_its_links(adapter: Path) -> None:
    with pinned_adapter(read(adapter)) as files:
        assert files.directory != str(adapter)
        assert Path(files.directory, WEIGHTS).read_bytes() == GOOD
        assert sorted(file.name for file in Path(files.directory).iterdir()) == ["adapter_config.json", WEIGHTS]
    assert not Path(files.directory).exists()


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_before_the_merge_is_found(change: Callable[[Path], None], adapter: Path, wording: Wording) -> None:
    files = read(adapter)
    change(adapter)
    with pytest.raises(EngineError, match=WEIGHTS) as caught, pinned_adapter(files):
        pass
    if change in {write_in_place, take_away}:
        wording(caught.value)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_during_the_merge_is_found(change: Callable[[Path], None], adapter: Path) -> None:
    with pytest.raises(EngineError, match=WEIGHTS), pinned_adapter(read(adapter)):
        change(adapter)


def test_the_bytes_are_hashed_not_only_the_times_compared(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system whose clock is coarse: the file looks untouched."""
    files = read(adapter)
    monkeypatch.setattr("merge_gate.worker.pinned.identity_of", lambda name, _: _identity(files, name))
    with pytest.raises(EngineError, match="SHA-256"), pinned_adapter(files):
        write_in_place(adapter)


def _identity(files: AdapterFiles, name: str) -> object:
    return next(record.identity for record in files.files if record.path == name)


def test_what_takes_the_place_of_an_open_file_is_never_read(adapter: Path) -> None:
    seen = b""
    with contextlib.suppress(EngineError), pinned_adapter(read(adapter)) as files:
        replace_file(adapter)
        seen = Path(files.directory, WEIGHTS).read_bytes()
    assert seen == GOOD


def test_a_merge_that_fails_over_a_change_is_told_as_the_change(adapter: Path) -> None:
    def merge() -> None:
        write_in_place(adapter)
        raise ValueError("a header that makes no sense")

    with pytest.raises(EngineError, match=WEIGHTS), pinned_adapter(read(adapter)):
        merge()


def test_a_directory_stays_though_another_takes_its_name(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("ours")
    with pinned_directory(str(base)) as held:
        base.rename(tmp_path / "moved")
        shutil.copytree(tmp_path / "moved", base)
        (base / "config.json").write_text("theirs")
        assert Path(held, "config.json").read_text() == "ours"


def test_a_system_without_such_links_reads_files_by_name(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "OPEN_FILES", Path("/nowhere"))
    with pinned_adapter(read(adapter)) as files:
        assert files.directory == str(adapter)
    with pinned_directory(str(adapter)) as directory:
        assert directory == str(adapter)
    files = read(adapter)
    with pytest.raises(EngineError, match=WEIGHTS), pinned_adapter(files):
        write_in_place(adapter)


def test_a_base_that_is_gone_is_another_one(tmp_path: Path, wording: Wording) -> None:
    (tmp_path / "base").mkdir()
    identity = base_identity(str(tmp_path / "base"))
    (tmp_path / "base").rmdir()
    with wording.of(EngineError, match="acme/b"):
        verify_base(str(tmp_path / "base"), "acme/b", identity)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "modeling.py"]
)
def test_each_file_that_makes_a_base_is_watched(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("before")
    identity = base_identity(str(tmp_path))
    (tmp_path / "README.md").write_text("not watched")
    verify_base(str(tmp_path), "acme/base", identity)
    (tmp_path / name).write_text("after!")
    with pytest.raises(EngineError, match="acme/base"):
        verify_base(str(tmp_path), "acme/base", identity)


@pytest.mark.parametrize(
    "shard", ["model.safetensors-00001-of-00001.safetensors", "part.safetensors", "a/b.safetensors"]
)
@pytest.mark.parametrize("named_by", ["an index", "config.json"])
def test_each_shard_is_watched_whatever_its_name_and_folder(shard: str, named_by: str, tmp_path: Path) -> None:
    index, config = (
        {"metadata": {}, "weight_map": {"x": shard, "y": "../y", "z": "/z"}},
        {"transformers_weights": shard},
    )
    name = "model.safetensors.index.json" if named_by == "an index" else "config.json"
    (tmp_path / name).write_text(json.dumps(index if named_by == "an index" else config))
    (tmp_path / shard).parent.mkdir(exist_ok=True)
    (tmp_path / shard).write_text("before")
    (tmp_path / "other.safetensors").write_text("not watched")
    identity = base_identity(str(tmp_path))
    assert [one.name for one in identity] == sorted([name, shard])
    (tmp_path / shard).write_text("after!")
    with pytest.raises(EngineError, match="acme/base"):
        verify_base(str(tmp_path), "acme/base", identity)


@pytest.mark.parametrize(
    "content", ["{", "[]", "[" * 100_000, '{"weight_map": 1}', '{"weight_map": {"x": [1]}}', "\xff"]
)
def test_an_index_that_cannot_be_read_names_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content, encoding="latin-1")
    assert [one.name for one in base_identity(str(tmp_path))] == ["model.safetensors.index.json"]
